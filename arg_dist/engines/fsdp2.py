"""DTensors: FSDP2 (``fully_shard``), tensor parallelism, both, or experts over a mesh axis.

Under FSDP2 by itself each process holds whole rows or whole columns of every parameter, a range of
its elements. On other meshes it holds a box.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from arg_dist.library_internals import TORCH
from arg_dist.sharding.fragment import Adapter, Fragment, Holding, ParameterGroup
from arg_dist.sharding.shard import local_part
from arg_dist.subspace.distributed import Interval, row_count


class ShardedTensorAdapter(Adapter):
    """DTensors on any mesh.

    Sharded in one dimension over one mesh axis, and replicated over the others (HSDP), they are
    held in ranges, and each copy of the model has a state. Anything else is held in boxes, and its
    state once over all processes of the mesh, or of that of other parameter groups if it is larger.
    """

    def recognizes(self, group: ParameterGroup) -> bool:
        """Whether any of the group's tensors is a DTensor."""
        return any(hasattr(target, "placements") for target in group.targets)

    def hold(self, group: ParameterGroup) -> Holding:
        """Returns this process's rows (or columns) of each parameter that trains, or rests.

        Raises:
            RuntimeError: a parameter is sharded in an unsupported way, or torch adds up gradients
                that should be averaged.
        """
        held = [(n, t) for n, t in zip(group.names, group.targets, strict=True) if group.holds(t)]
        for name, target in held:
            _check_placed(name, target)
            _check_averaged(name, target)
        meshes = {getattr(target, "device_mesh", None) for _, target in held}
        cuts = [cut for _, target in held if (cut := _cut_of(target)) is not None]
        own = _processes_of([target for _, target in held])
        everyone = _processes_of([*group.targets, *group.together])
        if len(meshes) > 1 or len(cuts) < len(held) or set(own) < set(everyone):
            return _in_boxes(held, everyone, group.process_group)
        fragments, process_group = [], None
        copies: tuple[dist.ProcessGroup, ...] = ()
        for (name, target), cut in zip(held, cuts, strict=True):
            fragments.append(_fragment(name, target, cut))
            process_group, copies = _group_along(target, cut), _copies(target)
        if process_group is not None and dist.get_world_size(process_group) == 1:
            process_group = None
        return Holding(fragments, process_group, copies=copies)

    def untrained(self, name: str, parameter: Tensor) -> Holding | None:
        """Returns this process's rows or columns, or its box."""
        if not hasattr(parameter, "placements"):
            return None
        _check_placed(name, parameter)
        if (cut := _cut_of(parameter)) is not None:
            return Holding([_fragment(name, parameter, cut)], _group_along(parameter, cut))
        copies, processes = _copies(parameter), _processes_of([parameter])
        return Holding([_boxed(name, parameter)], None, copies=copies, processes=processes)


def _in_boxes(
    held: list[tuple[str, Any]], everyone: tuple[int, ...], group: dist.ProcessGroup | None
) -> Holding:
    """What this process holds of parameters whose meshes are parts of a larger one.

    Args:
        held: names and DTensors, or plain tensors.
        everyone: indexes in the job of the processes of the larger one.
        group: the processes that train the model.
    """
    for name, target in held:
        ranks = _processes_of([target])
        if not set(ranks) <= set(everyone):
            raise RuntimeError(
                f"{name}: it lies on the processes {list(ranks)}, and other parameters on "
                f"{list(everyone)}; give parameters of different processes separate optimizers"
            )
    return Holding([_boxed(*each) for each in held], _group_of(everyone, group))


def _group_of(
    everyone: tuple[int, ...], group: dist.ProcessGroup | None
) -> dist.ProcessGroup | None:
    """The process group of the processes of a mesh; None if there is one."""
    if len(everyone) == 1:
        return None
    ranks = [] if group is None else sorted(dist.get_process_group_ranks(group))
    if list(everyone) != ranks:
        raise RuntimeError(
            f"process_group: its processes are {ranks or [dist.get_rank()]}, and the parameters "
            f"are sharded over a mesh of {list(everyone)}; pass the process group of these"
        )
    return group


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


class _Cut(NamedTuple):
    """How FSDP2 by itself shards a DTensor.

    Attributes:
        axis: of the mesh, over which it is sharded.
        dimension: the one that is sharded.
    """

    axis: int
    dimension: int


def _check_placed(name: str, target: Any) -> None:
    """Check that processes hold values of a parameter.

    Raises:
        RuntimeError: it is held as terms of a sum.
    """
    if any(placement.is_partial() for placement in _placements(target)):
        raise RuntimeError(
            f"{name}: its placements are {_placements(target)}, so that no process has its "
            "values (Partial); give the parameter Shard or Replicate placements"
        )


def _check_averaged(name: str, target: Any) -> None:
    """Check that torch averages the gradients of a parameter over its mesh.

    Raises:
        RuntimeError: it adds them up: FSDP2 over gloo did before torch 2.9.
    """
    if not _placements(target) or not TORCH.is_before("2.9"):
        return
    mesh = target.device_mesh
    if any(mesh.size(i) > 1 and _is_gloo(mesh.get_group(i)) for i in range(mesh.ndim)):
        raise RuntimeError(
            f"{name}: is a DTensor on a mesh of CPUs (gloo), where torch {TORCH.installed} adds up "
            "FSDP2's gradients instead of averaging them: pip install 'torch>=2.9', or train on "
            "GPUs (NCCL)"
        )


def _is_gloo(group: dist.ProcessGroup) -> bool:
    return str(dist.get_backend(group)) == "gloo"


def _placements(target: Any) -> tuple[Any, ...]:
    """How a DTensor lies on its mesh; () for a plain tensor."""
    return tuple(getattr(target, "placements", ()))


def _cut_of(target: Any) -> _Cut | None:
    """Where a DTensor is sharded, if in one dimension over one mesh axis; else None."""
    from torch.distributed.tensor import Shard

    others = [placement for placement in _placements(target) if not placement.is_replicate()]
    if len(others) != 1 or type(others[0]) is not Shard:
        return None
    (shard,) = others
    if shard.dim != 0 and (shard.dim, target.ndim) != (1, 2):
        return None
    return _Cut(target.placements.index(shard), shard.dim)


def _boxed(name: str, target: Any) -> Fragment:
    """The box of a DTensor on this process; all of a plain tensor, which every process holds."""
    placements, shape = _placements(target), tuple(target.shape)
    if target.is_complex():
        raise RuntimeError(
            f"{name}: a complex parameter with the placements {placements}; complex parameters "
            "need fully_shard alone, over one mesh axis"
        )
    box = tuple(_interval(name, target, dimension) for dimension in range(len(shape)))
    local = local_part(target)
    if tuple(local.shape) != tuple(map(row_count, box)):
        raise RuntimeError(
            f"{name}: with the placements {placements} this process has the shape "
            f"{tuple(local.shape)}, and not {tuple(map(row_count, box))}; arg_dist does not "
            "support this layout"
        )
    view = partial(_local_box, name=name, placements=placements)
    # a number is a box of one element
    return Fragment(name, shape, 0, local.numel(), target, view, box=box or ((0, 1),))


def _interval(name: str, target: Any, dimension: int) -> Interval:
    """What this process holds of one dimension of a DTensor."""
    indices = torch.arange(target.shape[dimension], dtype=torch.int64, device="cpu")
    for axis, placement in enumerate(_placements(target)):
        if placement.is_replicate() or placement.dim % target.ndim != dimension:
            continue
        coordinate, size = target.device_mesh.get_local_rank(axis), target.device_mesh.size(axis)
        # FSDP2 beside tensor parallelism cuts within each of its parts (_StridedShard)
        parts = torch.chunk(indices, getattr(placement, "split_factor", 1))
        indices = torch.cat([_chunk(part, size, coordinate) for part in parts])
    if not len(indices):
        return 0, 0
    first, last = int(indices[0]), int(indices[-1])
    if last - first + 1 != len(indices):
        raise RuntimeError(
            f"{name}: with the placements {_placements(target)} each process has several separate "
            f"pieces of dimension {dimension} (a packed plan, as of fused gate and up "
            "projections), which arg_dist does not support; in the tensor-parallel plan leave it "
            "replicated, cut it in one piece, or distribute whole experts (expert parallelism)"
        )
    return first, last + 1


def _chunk(indices: Tensor, count: int, position: int) -> Tensor:
    """One of so many chunks, the last of which may be shorter or empty."""
    chunks = torch.chunk(indices, count)
    return chunks[position] if position < len(chunks) else indices[:0]


def _local_box(tensor: Any, name: str, placements: tuple[Any, ...]) -> Tensor:
    pairs = list(zip(_placements(tensor), placements, strict=True))
    if all(has == wanted or has.is_replicate() for has, wanted in pairs):
        # what an embedding's backward leaves replicated is cut without a message
        is_cut = all(has == wanted for has, wanted in pairs)
        return local_part(tensor if is_cut else tensor.redistribute(placements=placements))
    raise RuntimeError(
        f"{name}: its gradient has the placements {_placements(tensor)}, and the parameter "
        f"{placements}; before step() set parameter.grad = "
        "parameter.grad.redistribute(placements=parameter.placements)"
    )


def _copies(target: Any) -> tuple[dist.ProcessGroup, ...]:
    """The groups of this process over which a DTensor is replicated."""
    mesh = target.device_mesh
    return tuple(
        mesh.get_group(axis)
        for axis, placement in enumerate(target.placements)
        if placement.is_replicate() and mesh.size(axis) > 1
    )


def _processes_of(targets: Sequence[Any]) -> tuple[int, ...]:
    """Indexes in the job of the processes of the largest mesh; () without a DTensor."""
    meshes = {target.device_mesh for target in targets if _placements(target)}
    processes = [tuple(sorted(mesh.mesh.flatten().tolist())) for mesh in meshes]
    return max(processes, key=len, default=())


def _group_along(target: Any, cut: _Cut) -> dist.ProcessGroup:
    group: dist.ProcessGroup = target.device_mesh.get_group(cut.axis)
    return group


def _fragment(name: str, target: Any, cut: _Cut) -> Fragment:
    axis, dimension = cut
    if target.is_complex() and dimension != 0:
        raise RuntimeError(
            f"{name}: a complex parameter sharded by columns; shard it by rows (Shard(0), which is "
            "fully_shard's default)"
        )
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
