"""One process, or several that each hold the whole model (DDP), with averaged gradients or not."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from arg_dist.config import ConfigError
from arg_dist.engines.joining import support_join
from arg_dist.engines.patching import meet_libraries
from arg_dist.library_internals import FLAT_PARAMETER, FLATTENED_PARAMETER, ZERO_REDUNDANCY
from arg_dist.sharding.entry import entry_point
from arg_dist.sharding.fragment import Adapter, Fragment, Holding, ParameterGroup
from arg_dist.sharding.shard import local_part


class ReplicatedAdapter(Adapter):
    """Plain tensors: each process holds all of them, so work and state are distributed.

    Also supports engines that train fp32 copies of the parameters, of the same shapes and order.
    """

    def on_construction(self, optimizer: Any) -> None:
        """Refuses torch's ZeroRedundancyOptimizer; prepares for ``join()`` and for saving.

        Libraries that save on the first process alone are made to gather the state there first.

        Raises:
            ConfigError: it is.
        """
        wrapper = ZERO_REDUNDANCY.if_imported()
        frame: FrameType | None = sys._getframe() if wrapper is not None else None
        while frame is not None:
            if isinstance(frame.f_locals.get("self"), wrapper):
                raise ConfigError(
                    "ZeroRedundancyOptimizer: gives each process some of the parameters, so that "
                    "it keeps their state alone; AdaRankGrad does that itself, and needs all of "
                    "them on every process; build it without: "
                    "arg_dist.AdaRankGrad(arg_dist.param_groups(model), ...)"
                )
            frame = frame.f_back
        support_join(optimizer)
        meet_libraries()

    def recognizes(self, group: ParameterGroup) -> bool:
        """Whether the targets are the parameters themselves, or copies of them."""
        return len(group.targets) == len(_copied(group)) or _are_originals(group)

    def hold(self, group: ParameterGroup) -> Holding:
        """Returns each parameter that trains, or rests, as a whole.

        Raises:
            RuntimeError: a parameter is sharded by FSDP1, or its copy has another shape or other
                values.
        """
        meet_libraries()  # those that were imported after the optimizer was built
        if _are_originals(group):
            pairs = [
                (name, target)
                for name, target in zip(group.names, group.targets, strict=True)
                if group.holds(target)
            ]
        else:
            copied = _copied(group)
            names = [name for name, _ in copied]
            _check_order(group, list(zip(names, group.targets, strict=True)))
            pairs = [
                (name, target)
                for (name, original), target in zip(copied, group.targets, strict=True)
                if _check_copy(name, original, target)
            ]
        fragments = []
        for name, target in pairs:
            if FLAT_PARAMETER.get(target, False) or FLATTENED_PARAMETER.is_on(target):
                raise RuntimeError(
                    f"{name}: it is cut by FSDP1 (FullyShardedDataParallel), which is not "
                    "supported; use FSDP2 (torch.distributed.fsdp.fully_shard)"
                )
            shape = tuple(target.shape)
            fragments.append(Fragment(name, shape, 0, target.numel(), target, local_part))
        several = group.process_group is not None
        return Holding(fragments, group.process_group, replicated=several)


@entry_point
def sketch_only(model: nn.Module) -> nn.Module:
    """Keep DistributedDataParallel from averaging gradients, for ``gradient_sync="sketch"``.

    Each process keeps its own, as under ``no_sync()``, and AdaRankGrad sends what it needs of them.
    DDP still makes the weights equal when it wraps the model, and its buffers in each forward pass.

    Args:
        model: the wrapped model.

    Returns:
        The same model.

    Raises:
        ConfigError: it is not wrapped in DistributedDataParallel, or that is compiled.
    """
    if not isinstance(model, DistributedDataParallel):
        raise ConfigError(
            f"sketch_only: got {type(model).__name__}, and a DistributedDataParallel is needed, "
            "the outermost wrapper; a model without one averages no gradients and needs no call"
        )
    model.require_backward_grad_sync = False
    return model


def _copied(group: ParameterGroup) -> list[tuple[str, Tensor]]:
    """The parameters of which the targets would be copies: all, or those that train.

    The engine made its copies at initialization; ``requires_grad`` may differ now.
    """
    alive = group.alive()
    if len(alive) == len(group.targets):
        return alive
    return [(name, parameter) for name, parameter in alive if parameter.requires_grad]


def _are_originals(group: ParameterGroup) -> bool:
    return len(group.targets) == len(group.parameters) and all(
        target is parameter
        for target, parameter in zip(group.targets, group.parameters, strict=True)
    )


def _check_copy(name: str, original: Tensor, copy: Tensor) -> bool:
    """Returns True if a copy can be trained in place of its original; raises otherwise."""
    if original.dtype == torch.float16:
        raise ConfigError(
            "fp16.enabled: got true at stage 0; DeepSpeed does not scale the loss there but "
            "unscales the gradients, which vanish; use bf16, or ZeRO stage 1, 2 or 3"
        )
    if original.shape != copy.shape:
        raise RuntimeError(
            f"{name}: expected shape {tuple(original.shape)} at its position in the parameter "
            f"group, found {tuple(copy.shape)}: what replaced the optimizer's parameters (an "
            "engine, or the job) has changed their order or shapes, which is not supported"
        )
    if not same_values(copy, original):
        raise RuntimeError(changed_weights(name))
    return True


def _check_order(group: ParameterGroup, pairs: list[tuple[str, Tensor]]) -> None:
    """Check that parameters themselves, in a new list, are at the places of their names."""
    names = {id(parameter): name for name, parameter in group.alive()}
    for name, target in pairs:
        own = names.get(id(target), name)
        if own != name:
            raise RuntimeError(
                f"{own}: it is at the place of {name} in the parameter group now; a group keeps "
                "the order in which its parameters were given; build a new optimizer for others"
            )


def same_values(copy: Tensor, original: Tensor) -> bool:
    """Whether an fp32 copy, rounded to the type of the original, equals it."""
    rounded = copy.detach().to(original.device, original.dtype)
    return torch.allclose(rounded, original.detach(), rtol=0, atol=0, equal_nan=True)


def changed_weights(name: str) -> str:
    """The error for a parameter whose fp32 copy, which the optimizer trains, has other values."""
    return (
        f"{name}: the fp32 copy that the optimizer trains differs from the parameter; the weights "
        "were changed after the engine made its copies (loaded after deepspeed.initialize?), and "
        "training would go on from the old ones; load them before deepspeed.initialize, or call "
        "engine.optimizer.refresh_fp32_params() after loading"
    )
