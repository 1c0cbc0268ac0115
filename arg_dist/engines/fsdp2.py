"""FSDP2 (``fully_shard``): each process holds whole rows or whole columns of every parameter."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from arg_dist.sharding.fragment import Adapter, Fragment, Holding, ParameterGroup


class ShardedTensorAdapter(Adapter):
    """DTensors sharded in one dimension over one mesh axis, replicated over the others (HSDP)."""

    def recognizes(self, group: ParameterGroup) -> bool:
        """Whether any of the group's tensors is a DTensor."""
        return any(hasattr(target, "placements") for target in group.targets)

    def hold(self, group: ParameterGroup) -> Holding:
        """Returns this process's rows (or columns) of each parameter that trains, or rests.

        Raises:
            RuntimeError: a parameter is sharded over two mesh axes, or in an unsupported way.
        """
        fragments, process_group = [], None
        copies: tuple[dist.ProcessGroup, ...] = ()
        for name, target in zip(group.names, group.targets, strict=True):
            if group.holds(target):
                axis, dimension = _cut(name, target)
                process_group = target.device_mesh.get_group(axis)  # type: ignore[attr-defined]
                fragments.append(_fragment(name, target, axis, dimension))
                copies = _copies(target, axis)
        if process_group is not None and dist.get_world_size(process_group) == 1:
            process_group = None
        return Holding(fragments, process_group, copies=copies)

    def untrained(self, name: str, parameter: Tensor) -> Holding | None:
        """Returns this process's rows or columns."""
        if not hasattr(parameter, "placements"):
            return None
        axis, dimension = _cut(name, parameter)
        group = parameter.device_mesh.get_group(axis)  # type: ignore[attr-defined]
        return Holding([_fragment(name, parameter, axis, dimension)], group)


def column_shards(processes: int) -> Callable[[nn.Parameter], Any]:
    """A ``shard_placement_fn`` for ``fully_shard`` that avoids communication between refreshes.

    Shards matrices with more columns than rows by columns, the dimension of their moments. With
    ``shard_basis=False`` a step without a refresh then sends no low-rank factor. PyTorch shards
    columns only if they divide evenly; other matrices are sharded by rows.

    Args:
        processes: number of processes over which a parameter is sharded.
    """
    from torch.distributed.tensor import Shard

    def placement(parameter: nn.Parameter) -> Any:
        is_matrix = parameter.ndim == 2 and not parameter.is_complex()
        wide = is_matrix and parameter.shape[0] < parameter.shape[1]
        return Shard(1) if wide and parameter.shape[1] % processes == 0 else None

    return placement


def _cut(name: str, target: Any) -> tuple[int, int]:
    """Returns the mesh axis and the dimension over which a DTensor is sharded."""
    if not hasattr(target, "placements"):
        raise RuntimeError(
            f"{name}: a plain tensor among DTensors (ignored_params?); shard it as well, or give "
            "it a separate optimizer"
        )
    sharded = [(axis, p.dim) for axis, p in enumerate(target.placements) if p.is_shard()]
    plain = all(p.is_shard() or p.is_replicate() for p in target.placements)
    if (
        len(sharded) != 1
        or not plain
        or (sharded[0][1] != 0 and (sharded[0][1], target.ndim) != (1, 2))
    ):
        raise RuntimeError(
            f"{name}: its placements are {tuple(target.placements)}; AdaRankGrad needs parameters "
            "that fully_shard has sharded in one dimension (0, or 1 of a matrix) over one mesh "
            "axis; tensor parallelism is not supported"
        )
    if target.is_complex() and sharded[0][1] != 0:
        raise RuntimeError(
            f"{name}: a complex parameter sharded by columns; shard it by rows (Shard(0), which is "
            "fully_shard's default)"
        )
    return sharded[0]


def _copies(target: Any, axis: int) -> tuple[dist.ProcessGroup, ...]:
    """The groups over which a DTensor is replicated: every mesh axis except the sharded one."""
    mesh = target.device_mesh
    others = [other for other in range(mesh.ndim) if other != axis and mesh.size(other) > 1]
    return tuple(mesh.get_group(other) for other in others)


def _fragment(name: str, target: Any, axis: int, dimension: int) -> Fragment:
    mesh, shape = target.device_mesh, tuple(target.shape)
    length = -(-shape[dimension] // mesh.size(axis))
    first = min(mesh.get_local_rank(axis) * length, shape[dimension])
    others = math.prod(size for i, size in enumerate(shape) if i != dimension)
    numel = target.to_local().numel()
    if dimension == 1:
        shape = shape[::-1]
    return Fragment(
        name,
        shape,
        first * others,
        first * others + numel,
        target,
        partial(_local, transposed=dimension == 1),
        transposed=dimension == 1,
    )


def _local(tensor: Any, transposed: bool) -> Tensor:
    local: Tensor = tensor.to_local()
    return local.T if transposed else local
