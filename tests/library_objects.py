"""Looks up internals of other libraries in the installed versions, on small real objects.

As a program, it looks up all that the package uses and prints what is missing, one line each. That
takes a process of its own: engines leave state in the process that builds them.
"""

from __future__ import annotations

import functools
import os
import pkgutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from arg_dist import library_internals
from arg_dist.library_internals import UNDOCUMENTED, Internal

NAMED = {name: each for name, each in vars(library_internals).items() if isinstance(each, Internal)}
"""The internals that the package takes from the table, by the names that they have there."""


def missing(internals: Iterable[Internal]) -> list[str]:
    """A line for each that the installed version of its library does not have."""
    return [
        f"{each.library.name} {version(each.library.package)} (tested: {each.library.tested}): "
        f"{each.owner} has no {each.name} ({reason}), which is needed for: {each.feature}"
        for each in internals
        if (reason := _reason(each)) is not None
    ]


def _reason(internal: Internal) -> str | None:
    """Why a name cannot be used; None if it can."""
    try:
        if " " not in internal.owner and internal.is_on(pkgutil.resolve_name(internal.owner)):
            return None
        if internal.owner not in OBJECTS:
            return "looked up in the module or class"
        return None if internal.is_on(OBJECTS[internal.owner]()) else "looked up in an object"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# -- torch -----------------------------------------------------------------------------------------


def layer() -> nn.Module:
    return nn.Linear(6, 4)


@functools.cache
def process_group() -> Any:
    """The group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


def checkpointed() -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(layer())


def fsdp1_parameter(*, use_orig_params: bool) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    process_group()
    model = FullyShardedDataParallel(
        layer(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    return next(model.parameters())


def join() -> Any:
    from torch.distributed.algorithms.join import Join

    process_group()
    return Join([nn.parallel.DistributedDataParallel(layer())])


# -- DeepSpeed -------------------------------------------------------------------------------------


@functools.cache
def engine(stage: int, **more: Any) -> Any:
    """A DeepSpeed engine, with the optimizer that its stage wraps around others."""
    import deepspeed

    process_group()
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # saves its compilation
    model = layer()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": stage == 0},
        **more,
    }
    optimizer = torch.optim.SGD(model.parameters())
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def parameter(stage: int) -> Any:
    return engine(stage).module.weight


# -- accelerate and transformers -------------------------------------------------------------------


def accelerator(**options: Any) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    try:
        return Accelerator(**options)
    finally:  # else the next one would take over its settings
        AcceleratorState._reset_state(True)
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def deepspeed_accelerator() -> Any:
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

    process_group()
    return accelerator(
        deepspeed_plugin=DeepSpeedPlugin(zero_stage=1),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )


@functools.cache
def trainer() -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(tempfile.gettempdir(), use_cpu=True, report_to="none")
    return Trainer(layer(), arguments)


OBJECTS: dict[str, Callable[[], Any]] = {
    "torch.nn.Module": layer,
    "torch.optim.Optimizer": lambda: torch.optim.SGD(layer().parameters()),
    "torch._dynamo.eval_frame.OptimizedModule": lambda: torch.compile(layer()),
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": checkpointed,
    "torch.distributed.algorithms.join.Join": join,
    "torch.optim.Adam with fused=True": lambda: torch.optim.Adam(layer().parameters(), fused=True),
    "a parameter under FSDP1": lambda: fsdp1_parameter(use_orig_params=False),
    "a parameter under FSDP1 with use_orig_params": lambda: fsdp1_parameter(use_orig_params=True),
    "deepspeed.runtime.engine.DeepSpeedEngine": lambda: engine(1),
    "deepspeed.runtime.config.DeepSpeedConfig": lambda: engine(1)._config,
    "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer": lambda: engine(0).optimizer,
    "deepspeed.utils.tensor_fragment.tensor_fragment": lambda: parameter(1)._hp_mapping,
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": lambda: engine(3).optimizer,
    "a parameter under ZeRO-1 or 2": lambda: parameter(1),
    "a parameter under ZeRO-3": lambda: parameter(3),
    "accelerate.accelerator.Accelerator": lambda: accelerator(cpu=True),
    "an Accelerator with DeepSpeed": deepspeed_accelerator,
    "transformers.trainer.Trainer": trainer,
    "transformers.trainer_callback.CallbackHandler": lambda: trainer().callback_handler,
    "transformers.training_args.TrainingArguments": lambda: trainer().args,
}
"""An object of each owner whose class does not show the names of its objects."""


if __name__ == "__main__":
    found = missing([*NAMED.values(), *UNDOCUMENTED])
    print("\n".join(found))
    sys.exit(bool(found))
