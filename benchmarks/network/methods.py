"""What the network benchmark compares: how gradients are averaged, and the optimizer."""

from __future__ import annotations

from dataclasses import dataclass


def _set(**settings: object) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


HSDP_HOOKS = ("hsdp", "hsdp-apart")
"""FSDP2 averages the gradients of all hosts, or of each host alone."""
ADAMW, OURS = ("--optimizer", "adamw"), ("--optimizer", "adarankgrad")
SKETCH = (*OURS, *_set(gradient_sync="sketch"))
ONE_BIT = {"residual": "matched", "residual_sync_bits": 1, "residual_back_bits": 1}


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        title: its name in tables.
        words: arguments of the job.
        under_ddp: trains under DistributedDataParallel, instead of the DeepSpeed configuration.
        hook: of :mod:`benchmarks.network.clocked`: a communication hook of DistributedDataParallel,
            or FSDP2 within each host in its place.
    """

    title: str
    words: tuple[str, ...]
    under_ddp: bool = True
    hook: str = ""

    @property
    def shards_hosts(self) -> bool:
        """Whether a host's processes share a copy of the model."""
        return self.hook in HSDP_HOOKS


METHODS = {
    "adamw": Method("AdamW", ADAMW, under_ddp=False),
    "adarankgrad": Method("AdaRankGrad", OURS, under_ddp=False),
    "ddp-adamw": Method("AdamW, DDP", ADAMW),
    "ddp-adamw-fp16": Method("AdamW, DDP, gradients in fp16", ADAMW, hook="fp16"),
    "ddp-adamw-powersgd": Method("AdamW, DDP, PowerSGD", ADAMW, hook="powersgd"),
    "ddp-adarankgrad": Method("AdaRankGrad, DDP", OURS),
    "sketch": Method("AdaRankGrad, sketch", SKETCH),
    "sketch-vote": Method(
        "AdaRankGrad, sketch, matched, 1 bit",
        (*SKETCH, *_set(**ONE_BIT)),
    ),
    "sketch-vote-bf16": Method(
        "AdaRankGrad, sketch in bf16, matched, 1 bit",
        (*SKETCH, *_set(sync_precision="bf16", **ONE_BIT)),
    ),
    "sketch-bf16": Method(
        "AdaRankGrad, sketch in bf16",
        (*SKETCH, *_set(sync_precision="bf16", polar_precision="bf16")),
    ),
    "sketch-none": Method("AdaRankGrad, sketch, no residual", (*SKETCH, *_set(residual="none"))),
    "sketch-none-bf16": Method(
        "AdaRankGrad, sketch in bf16, no residual",
        (*SKETCH, *_set(residual="none", sync_precision="bf16")),
    ),
    "hsdp-adamw": Method("AdamW, HSDP", ADAMW, hook="hsdp"),
    "hsdp-adarankgrad": Method("AdaRankGrad, HSDP", OURS, hook="hsdp"),
    "hsdp-sketch": Method("AdaRankGrad, FSDP2, sketch between hosts", SKETCH, hook="hsdp-apart"),
}
"""By the value of ``--methods``."""
