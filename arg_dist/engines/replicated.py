"""One process, or several that each hold the whole model and the same averaged gradient (DDP)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arg_dist.config import ConfigError
from arg_dist.engines.library_hooks import meet_libraries
from arg_dist.sharding.fragment import ADAPTERS, Adapter, Fragment, Holding, ParameterGroup


class ReplicatedAdapter(Adapter):
    """Plain tensors: each process holds all of them, so work and state are distributed.

    Also supports engines that train fp32 copies of the parameters, of the same shapes and order.
    """

    def on_construction(self, optimizer: Any) -> None:
        """Makes libraries that save on the first process alone gather the state there first."""
        meet_libraries()

    def recognizes(self, group: ParameterGroup) -> bool:
        """Whether the targets are the parameters themselves, or copies of the trainable ones."""
        return len(group.targets) == len(_trainable(group)) or _are_originals(group)

    def hold(self, group: ParameterGroup) -> Holding:
        """Returns each trainable parameter as a whole.

        Raises:
            RuntimeError: a parameter is sharded by FSDP1 or not contiguous, or its copy has another
                shape.
        """
        meet_libraries()  # those that were imported after the optimizer was built
        if _are_originals(group):
            pairs = [
                (name, target)
                for name, target in zip(group.names, group.targets, strict=True)
                if target.requires_grad
            ]
        else:
            pairs = [
                (name, target)
                for (name, original), target in zip(_trainable(group), group.targets, strict=True)
                if _check_copy(name, original, target)
            ]
        fragments = []
        for name, target in pairs:
            if getattr(target, "_is_flat_param", False) or hasattr(target, "_fsdp_flattened"):
                raise RuntimeError(
                    f"{name}: it is cut by FSDP1 (FullyShardedDataParallel), which is not "
                    "supported; use FSDP2 (torch.distributed.fsdp.fully_shard)"
                )
            if not target.is_contiguous():
                raise RuntimeError(
                    f"{name}: its memory is not contiguous (shape {tuple(target.shape)}, strides "
                    f"{target.stride()}); set parameter.data = parameter.data.contiguous()"
                )
            shape = tuple(target.shape)
            fragments.append(Fragment(name, shape, 0, target.numel(), target, _itself))
        several = group.process_group is not None
        return Holding(fragments, group.process_group, replicated=several)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _trainable(group: ParameterGroup) -> list[tuple[str, Tensor]]:
    return [(name, parameter) for name, parameter in group.alive() if parameter.requires_grad]


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
            f"group, found {tuple(copy.shape)}: an engine has reordered the parameters"
        )
    return True


ADAPTERS.append(ReplicatedAdapter())
