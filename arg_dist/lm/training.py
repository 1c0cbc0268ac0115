"""What a training loop is made of: processes, an engine, a step, a held-out loss."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pydantic import ValidationError

import arg_dist
from arg_dist.lm import InputError
from arg_dist.lm.tokens import Sequences

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch.optim import Optimizer


def connect_processes() -> torch.device:
    """Joins the job's processes (NCCL on GPUs, gloo on CPUs) and returns this one's device.

    Raises:
        InputError: the first process cannot open the port where the others look for it.
    """
    import deepspeed

    accelerator = deepspeed.get_accelerator()
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        deepspeed.init_distributed(accelerator.communication_backend_name(), verbose=False)
    except dist.DistNetworkError:
        raise InputError(
            f"port {os.environ['MASTER_PORT']} cannot be used, perhaps by another job's doing; "
            "give the launcher another one with --master_port"
        ) from None
    return torch.device(accelerator.current_device_name())


def leave_processes() -> None:
    """Ends what :func:`connect_processes` began; without it gloo's threads may abort the exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_deepspeed_config(config: dict[str, Any]) -> None:
    """Lets DeepSpeed read `config` before a model is built for it.

    Raises:
        InputError: DeepSpeed refuses it.
    """
    from deepspeed import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(config)
    except ValidationError as error:
        fault = error.errors()[0]
        path = ".".join(map(str, fault["loc"]))
        raise InputError(
            f"DeepSpeed JSON, {error.title}, {path}: {fault['msg']}, got {fault['input']!r}"
        ) from None
    except (ValueError, AssertionError, DeepSpeedConfigError) as error:
        raise InputError("DeepSpeed JSON: " + " ".join(str(error).split())) from None


def build_engine(
    model: torch.nn.Module,
    config: dict[str, Any],
    lr_scheduler: Callable[[Optimizer], Any],
) -> DeepSpeedEngine:
    """The DeepSpeed engine of `model` with the optimizer that ``config["optimizer"]`` names.

    Raises:
        InputError: the optimizer or DeepSpeed refuses a setting.
    """
    try:
        if config["optimizer"]["type"] == "AdamW":
            return _adamw_engine(model, config, lr_scheduler)
        return arg_dist.initialize(model=model, config=config, lr_scheduler=lr_scheduler)[0]
    except ValueError as error:  # while an engine is built, these are about settings
        raise InputError(str(error)) from None


def _adamw_engine(
    model: torch.nn.Module,
    config: dict[str, Any],
    lr_scheduler: Callable[[Optimizer], Any],
) -> DeepSpeedEngine:
    import deepspeed

    settings = config["optimizer"]["params"]
    rest = {key: value for key, value in config.items() if key != "optimizer"}
    return deepspeed.initialize(
        model=model,
        config=rest,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, **settings),
        lr_scheduler=lr_scheduler,
    )[0]


def train_step(engine: DeepSpeedEngine, sequences: Sequences, step: int) -> torch.Tensor:
    """One optimizer step on this process's part of the global batch; returns its mean loss."""
    micro = engine.train_micro_batch_size_per_gpu()
    accumulation = engine.gradient_accumulation_steps()
    first = dist.get_rank() * micro * accumulation
    total = torch.zeros((), device=engine.device)
    for start in range(first, first + micro * accumulation, micro):
        ids = sequences.batch(step, range(start, start + micro)).to(engine.device)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        total += loss.detach().float()
    return total / accumulation


@torch.no_grad()
def held_out_loss(engine: DeepSpeedEngine, sequences: Sequences, batches: int) -> float:
    """The mean loss over `batches` global batches of held-out sequences, always the same ones."""
    micro = engine.train_micro_batch_size_per_gpu()
    count = batches * engine.train_batch_size()
    share = count // dist.get_world_size()
    first = dist.get_rank() * share
    total = torch.zeros((), device=engine.device)
    engine.eval()
    for start in range(first, first + share, micro):
        ids = sequences.held_out_batch(range(start, start + micro), count).to(engine.device)
        total += engine(input_ids=ids, labels=ids).loss.float() * micro
    engine.train()
    dist.all_reduce(total)
    return total.item() / count
