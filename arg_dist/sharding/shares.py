"""Each process's bytes as a share of one tensor, for PyTorch's distributed checkpoints.

These collect state dictionaries from all processes and merge them by key. They keep what every
process holds of a tensor that is sharded, and one process's copy of anything else.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from arg_dist.library_internals import COLLECTING_STATE
from arg_dist.sharding.fragment import Fragment


def is_merged() -> bool:
    """Whether PyTorch is collecting or distributing state for a checkpoint: it is the caller."""
    frame = sys._getframe(1) if COLLECTING_STATE.if_imported() is not None else None
    while frame is not None:
        if frame.f_globals.get("__name__") == COLLECTING_STATE.owner:
            return True
        frame = frame.f_back
    return False


def is_sharded(target: Tensor) -> bool:
    """Whether a tensor carries its distribution over the processes (a DTensor)."""
    return hasattr(target, "placements")


def as_share(local: Tensor, fragment: Fragment, group: dist.ProcessGroup | None) -> Tensor:
    """View one-dimensional data of equal length on all processes as shares of one tensor.

    Args:
        local: this process's data.
        fragment: the parameter, whose mesh is that of the shares if it is held in ranges.
        group: the processes that take part; None for this one alone.
    """
    target: Any = fragment.target
    by_mesh = is_sharded(target) and fragment.box is None
    if group is None and not by_mesh:
        return local
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if by_mesh:
        mesh = target.device_mesh
        placements = [Shard(0) if p.is_shard() else Replicate() for p in target.placements]
    else:
        assert group is not None
        mesh, placements = DeviceMesh.from_group(group, target.device.type), [Shard(0)]
    size = torch.Size([local.numel() * (1 if group is None else dist.get_world_size(group))])
    shared: Tensor = DTensor.from_local(
        local.to(target.device), mesh, placements, run_check=False, shape=size, stride=(1,)
    )
    return shared


def own_share(shared: Any, holder: tuple[int, int]) -> Tensor:
    """This process's share of a tensor that :func:`as_share` returned, gathered or not.

    Args:
        shared: the tensor.
        holder: this process's index, and the number of processes.
    """
    if is_sharded(shared):
        local: Tensor = shared.to_local()
        return local
    length = shared.numel() // holder[1]
    share: Tensor = shared[holder[0] * length : (holder[0] + 1) * length]
    return share
