"""What accelerate does without a word, caught before the first step."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from arg_dist.config import ConfigError
from arg_dist.optimizer import AdaRankGrad

if TYPE_CHECKING:
    from accelerate import Accelerator


def prepare(accelerator: Accelerator, model: Any, optimizer: Any, *more: Any) -> Any:
    """``accelerator.prepare`` for AdaRankGrad: same arguments, same values returned.

    Refuses what would train otherwise than it seems, and lets ``accelerator.save_state`` save all
    of the optimizer's state, which under DDP is shared out over the processes.

    Args:
        accelerator: the accelerator.
        model: the model.
        optimizer: an AdaRankGrad, or the ``DummyOptim`` that stands for the DeepSpeed JSON's.
        *more: data loaders, schedulers.

    Raises:
        ConfigError: see :func:`check_accelerator` and :func:`check_optimizer`.
    """
    check_accelerator(accelerator)
    prepared = accelerator.prepare(model, optimizer, *more)
    ours = check_optimizer(prepared[1])
    accelerator.register_save_state_pre_hook(lambda *_: ours.consolidate_state_dict())
    return prepared


def check_optimizer(prepared: Any) -> AdaRankGrad:
    """The AdaRankGrad inside what ``accelerator.prepare`` returned for the optimizer.

    accelerate hands DeepSpeed another optimizer than it was given if the JSON offloads the
    optimizer, and says nothing. So call this between ``prepare`` and the first step.

    Args:
        prepared: the prepared optimizer, with the wrappers of accelerate and DeepSpeed around it.

    Raises:
        ConfigError: another optimizer trains; the message has its name and what to do.
    """
    inner = innermost(prepared)
    if isinstance(inner, AdaRankGrad):
        return inner
    name = type(inner).__name__
    if not isinstance(inner, Optimizer):
        raise ConfigError(
            f"check_optimizer: got {name}, which is no optimizer; give it the optimizer that "
            "accelerator.prepare(model, optimizer) returned"
        )
    if name.startswith("DeepSpeedCPU"):
        raise ConfigError(
            f"the optimizer that trains is {name}, not AdaRankGrad: with offload_optimizer "
            "accelerate replaces every optimizer, without a word; set "
            '"zero_force_ds_cpu_optimizer": false in the DeepSpeed JSON'
        )
    raise ConfigError(
        f"the optimizer that trains is {name}, not AdaRankGrad; give accelerator.prepare an "
        'arg_dist.AdaRankGrad, or name it in the DeepSpeed JSON ("optimizer": {"type": '
        '"AdaRankGrad", ...}) and give accelerator.prepare a DummyOptim'
    )


def innermost(prepared: Any) -> Any:
    """The optimizer inside the wrappers of accelerate and DeepSpeed (their ``.optimizer``)."""
    inner = prepared
    while (below := getattr(inner, "optimizer", None)) is not None:
        inner = below
    return inner


def check_environment() -> None:
    """Refuses what ``accelerate launch`` was told and AdaRankGrad cannot do; starts nothing.

    Raises:
        ConfigError: FSDP1 was asked for.
    """
    version = os.environ.get("FSDP_VERSION", "1")
    if asks_for("FSDP") and version != "2":
        raise ConfigError(
            f"fsdp_version: got {version}, accelerate's default; AdaRankGrad does not support "
            'FSDP1; write "fsdp_version: 2" below fsdp_config, or give --fsdp_version 2'
        )


def check_accelerator(accelerator: Accelerator) -> None:
    """Refuses an accelerator that trains otherwise than it was told, or in an unknown way.

    Raises:
        ConfigError: FSDP was asked for and turned off, or is FSDP1; or the processes do not know
            of each other; or the engine is not one that AdaRankGrad works with.
    """
    kind = accelerator.distributed_type.value
    if asks_for("FSDP") and kind != "FSDP":
        raise ConfigError(
            f"use_fsdp: accelerate was told to shard with FSDP and turned it off without a word "
            f"(distributed type {kind}): it knows FSDP on GPUs and their like only, and found "
            f"{accelerator.device.type}; use DDP (launchers/accelerate/cpu.yaml) or DeepSpeed here"
        )
    if kind == "FSDP" and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ConfigError(
            f"fsdp_version: got {accelerator.state.fsdp_plugin.fsdp_version}; AdaRankGrad does "
            "not support FSDP1; give FullyShardedDataParallelPlugin(fsdp_version=2)"
        )
    if kind not in ("NO", "FSDP", "DEEPSPEED") and not kind.startswith("MULTI_"):
        raise ConfigError(
            f"distributed_type: got {kind}; AdaRankGrad works with accelerate's MULTI_CPU, "
            "MULTI_GPU, DEEPSPEED and FSDP (fsdp_version: 2)"
        )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != started:
        raise ConfigError(
            f"accelerate counts {accelerator.num_processes} process(es) where {started} were "
            "started, so each of them would train alone; on CPUs give Accelerator "
            'kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")]'
        )


def engine_name(accelerator: Accelerator) -> str:
    """What trains under an accelerator: ``"ZeRO-2"``, ``"FSDP2"``, ``"DDP"``, ``"PyTorch"``."""
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED":
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    return {"FSDP": "FSDP2", "NO": "PyTorch"}.get(kind, "DDP")


def asks_for(engine: str) -> bool:
    """Whether ``accelerate launch`` was told to use `engine`: ``"FSDP"`` or ``"DEEPSPEED"``."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"
