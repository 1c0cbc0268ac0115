"""How to train under each engine of the table: by PyTorch's means, by accelerate, by the Trainer.

Each function trains on all processes of the launch and tells what this one saw.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.launch import torch_engines
from tests.launch.training import Run, one_process, train


def describe(model: nn.Module) -> str:
    """The engine that has got hold of a model: its name, and how it cuts.

    ``FSDP2 S0 S1`` has parameters cut by rows and others by columns, ``R,S0`` cut copies.
    """
    if isinstance(model, DistributedDataParallel):
        return "DDP"
    if hasattr(model, "zero_optimization_stage"):
        return f"ZeRO-{model.zero_optimization_stage()}"
    cuts = {
        ",".join(f"S{at.dim}" if at.is_shard() else "R" for at in parameter.placements)
        for parameter in model.parameters()
        if hasattr(parameter, "placements")
    }
    return " ".join(["FSDP2", *sorted(cuts)]) if cuts else "one process"


def alone() -> Run:
    training = one_process("llama")
    return {**train(training), "engine": describe(training.model)}


def torch_engine(*, engine: str) -> Run:
    """Under an engine of ``torch_engines``, by its name there."""
    training = getattr(torch_engines, engine).start(dist.group.WORLD)
    return {**train(training, group=dist.group.WORLD), "engine": describe(training.model)}


def accelerate_engine(
    *, stage: int | None = None, fsdp: bool = False, cpu: bool = False, precision: str = "no"
) -> Run:
    """By a loop around accelerate; as the launcher said, where no engine is given."""
    from tests.launch import accelerate_engines as engines

    with engines.cpus_as_gpus() if fsdp else nullcontext():
        plugin = engines.fsdp2_plugin() if fsdp else engines.deepspeed_plugin(stage)
        training = engines.start(cpu=cpu, mixed_precision=precision, **plugin)
    run = train(training, group=dist.group.WORLD)
    return {**run, "engine": describe(training.model)}


def trainer_engine(
    *, stage: int | None = None, fsdp: bool = False, cpu: bool = False, precision: str = "no"
) -> Run:
    """By the Trainer, from ``TrainingArguments`` alone."""
    from tests.launch import accelerate_engines, trainer_engines

    engine: dict[str, Any] = {"use_cpu": cpu, "ddp_backend": "gloo"}
    if fsdp:
        engine = {"fsdp": True, "fsdp_config": trainer_engines.FSDP2}
    if stage is not None:
        engine = {"deepspeed": accelerate_engines.zero_config(stage)}
    with nullcontext() if cpu else accelerate_engines.cpus_as_gpus():
        run, model = trainer_engines.train(bf16=precision == "bf16", **engine)
    return {**run, "engine": describe(model)}
