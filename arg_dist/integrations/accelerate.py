"""accelerate: prepare AdaRankGrad, and detect silent changes to the setup before the first step."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.optim import Optimizer

from arg_dist.config import ConfigError
from arg_dist.optimizer import AdaRankGrad

if TYPE_CHECKING:
    from accelerate import Accelerator


def prepare(accelerator: Accelerator, model: Any, optimizer: Any, *more: Any) -> Any:
    """``accelerator.prepare`` for AdaRankGrad, with the same arguments and return values.

    Refuses setups that would not train as configured. ``accelerator.save_state`` saves all of the
    optimizer's state, which under DDP is distributed over the processes.

    Args:
        accelerator: the accelerator.
        model: the model.
        optimizer: an AdaRankGrad, or the ``DummyOptim`` in place of the DeepSpeed JSON's optimizer.
        *more: data loaders, schedulers, and further models and optimizers; in any order.

    Raises:
        ConfigError: see :func:`check_accelerator` and :func:`check_optimizer`.
    """
    check_accelerator(accelerator)
    prepared = accelerator.prepare(model, optimizer, *more)
    optimizers = [each for each in prepared if isinstance(each, Optimizer)]
    if not any(isinstance(innermost(each), AdaRankGrad) for each in optimizers):
        check_optimizer(optimizers[0] if optimizers else prepared[1])
    return prepared


def check_optimizer(prepared: Any) -> AdaRankGrad:
    """Returns the AdaRankGrad inside the optimizer that ``accelerator.prepare`` returned.

    If the DeepSpeed JSON offloads the optimizer, accelerate silently passes another one to
    DeepSpeed. Call this between ``prepare`` and the first step to detect that.

    Args:
        prepared: the prepared optimizer, including the wrappers of accelerate and DeepSpeed.

    Raises:
        ConfigError: another optimizer trains; the message names it and the remedy.
    """
    inner = innermost(prepared)
    if isinstance(inner, AdaRankGrad):
        return inner
    name = type(inner).__name__
    if not isinstance(inner, Optimizer):
        raise ConfigError(
            f"check_optimizer: got {name}, which is not an optimizer; pass the optimizer that "
            "accelerator.prepare(model, optimizer) returned"
        )
    if name.startswith("DeepSpeedCPU"):
        raise ConfigError(
            f"the optimizer that trains is {name}, not AdaRankGrad: with offload_optimizer "
            "accelerate silently replaces every optimizer; set "
            '"zero_force_ds_cpu_optimizer": false in the DeepSpeed JSON'
        )
    raise ConfigError(
        f"the optimizer that trains is {name}, not AdaRankGrad; pass an arg_dist.AdaRankGrad to "
        'accelerator.prepare, or name it in the DeepSpeed JSON ("optimizer": {"type": '
        '"AdaRankGrad", ...}) and pass a DummyOptim'
    )


def innermost(prepared: Any) -> Any:
    """Returns the optimizer inside the wrappers of accelerate and DeepSpeed (``.optimizer``)."""
    inner = prepared
    while (below := getattr(inner, "optimizer", None)) is not None:
        inner = below
    return inner


def check_environment() -> None:
    """Refuses settings of ``accelerate launch`` that AdaRankGrad does not support; starts nothing.

    Raises:
        ConfigError: FSDP1 was requested.
    """
    version = os.environ.get("FSDP_VERSION", "1")
    if asks_for("FSDP") and version != "2":
        raise ConfigError(
            f"fsdp_version: got {version}, accelerate's default; AdaRankGrad does not support "
            'FSDP1; set "fsdp_version: 2" in fsdp_config, or pass --fsdp_version 2'
        )


def check_accelerator(accelerator: Accelerator) -> None:
    """Refuses an accelerator that deviates from its configuration or has an unsupported engine.

    Raises:
        ConfigError: FSDP was requested but turned off, or is FSDP1; or the processes would not
            communicate; or AdaRankGrad does not support the engine.
    """
    kind = accelerator.distributed_type.value
    if asks_for("FSDP") and kind != "FSDP":
        raise ConfigError(
            f"use_fsdp: accelerate was told to shard with FSDP but silently turned it off "
            f"(distributed type {kind}): it supports FSDP only on GPUs and similar devices, and "
            f"found {accelerator.device.type}; use DDP (launchers/accelerate/cpu.yaml) or DeepSpeed"
        )
    if kind == "FSDP" and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ConfigError(
            f"fsdp_version: got {accelerator.state.fsdp_plugin.fsdp_version}; AdaRankGrad does "
            "not support FSDP1; pass FullyShardedDataParallelPlugin(fsdp_version=2)"
        )
    if kind not in ("NO", "FSDP", "DEEPSPEED") and not kind.startswith("MULTI_"):
        raise ConfigError(
            f"distributed_type: got {kind}; AdaRankGrad supports accelerate's MULTI_CPU, "
            "MULTI_GPU, DEEPSPEED and FSDP (fsdp_version: 2)"
        )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if dist.is_initialized():
        started = dist.get_world_size()
    if accelerator.num_processes != started:
        raise ConfigError(
            f"accelerate counts {accelerator.num_processes} process(es) where {started} were "
            "started, so each of them would train separately; on CPUs pass "
            'kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] to Accelerator; for the '
            'Trainer, call accelerate.PartialState(backend="gloo") before creating its arguments'
        )


def engine_name(accelerator: Accelerator) -> str:
    """Returns an accelerator's engine: ``"ZeRO-2"``, ``"FSDP2"``, ``"DDP"`` or ``"PyTorch"``."""
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED":
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    return {"FSDP": "FSDP2", "NO": "PyTorch"}.get(kind, "DDP")


def asks_for(engine: str) -> bool:
    """Whether ``accelerate launch`` requested `engine`: ``"FSDP"`` or ``"DEEPSPEED"``."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"
