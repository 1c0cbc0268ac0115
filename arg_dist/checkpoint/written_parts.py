"""What one process writes to a checkpoint: its slices of the optimizer's state and the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from arg_dist.checkpoint.index import SlicedTensor, StateEntry, Weight, tensor_key
from arg_dist.checkpoint.slices import within
from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.fragment import Box, Fragment, Holding, adapters
from arg_dist.sharding.job import has_first_process, is_first_process, ranks_of
from arg_dist.sharding.plan import Plan
from arg_dist.sharding.shard import MatrixShard, Shard
from arg_dist.state_dict import kept_parts
from arg_dist.subspace.distributed import row_count
from arg_dist.subspace.state import SUMMED, State, lists_of, numbers_of


@dataclass(frozen=True)
class Contents:
    """What one process writes.

    Attributes:
        states: index entries of the optimizer's state, with this process's slices only.
        weights: index entries of the weights, likewise.
        tensors: the slices, by their names in the file; views of the optimizer's and the engine's
            tensors where possible.
    """

    states: dict[str, StateEntry] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def slice_of(
        self, key: str, process: int, box: Box, shape: tuple[int, ...], values: Tensor
    ) -> SlicedTensor:
        """Registers `values` as what lies in a box of the leading dimensions of a tensor."""
        slices = []
        if all(start < stop for start, stop in box):
            self.tensors[key] = values
            slices.append((process, *chain.from_iterable(box)))
        return SlicedTensor(shape=shape, dtype=dtype_name(values.dtype), slices=slices)

    def on_host(self) -> Contents:
        """Returns a copy in host memory, which training cannot modify."""
        tensors = {
            key: value.detach().to("cpu", copy=True).contiguous()
            for key, value in self.tensors.items()
        }
        return Contents(self.states, self.weights, tensors)


def add_states(
    contents: Contents, plan: Plan, states: Iterable[tuple[Shard, State]], process: int
) -> None:
    """Adds this process's part of each shard's state; each row is written by one process only."""
    for shard, state in states:
        if not state:
            continue
        matrix = shard if isinstance(shard, MatrixShard) else None
        tensors = {}
        for part, (values, kept) in kept_parts(shard, state).items():
            shape = (max(stop for _, stop in kept), *values.shape[1:])
            box: Box = (kept[shard.me],)
            if matrix is None and shard.fragment.box is not None:
                box, shape = plan.own[shard.fragment.name], shape_in(shard.fragment)
                values = values.view(tuple(map(row_count, box)))
            key = tensor_key("state", shard.name, part)
            tensors[part] = contents.slice_of(key, process, box, shape, values)
        first = shard.sharding.kept_rows[shard.me][0]
        contents.states[shard.name] = StateEntry(
            kind="tensor" if matrix is None else "matrix",
            shape=shard.fragment.parameter_shape if matrix is None else matrix.shape,
            transposed=matrix is None and shard.fragment.transposed,
            side=None if matrix is None else matrix.side_name,
            numbers=numbers_of(state),
            lists=lists_of(state),
            tensors=tensors,
            sums={k: [(process, first, float(state[k]))] for k in SUMMED if k in state},
        )


def add_trained_weights(contents: Contents, plan: Plan, process: int) -> None:
    """Adds this process's part of the weights that a plan's optimizer trains."""
    for fragment in plan.held:
        own = plan.own[fragment.name]
        contents.weights[fragment.name] = _weight(contents, fragment, own, process)


def add_untrained_weights(
    contents: Contents,
    parameters: Iterable[tuple[str, Tensor]],
    buffers: Iterable[tuple[str, Tensor]],
    job: Communicator,
) -> None:
    """Adds what no optimizer trains; replicated tensors are written by the first process only."""
    for kind, named in (("frozen", parameters), ("buffer", buffers)):
        for name, tensor in named:
            holding = held_untrained(name, tensor)
            [fragment] = holding.fragments
            own = fragment.held
            if not _is_written_here(holding, job):
                own = tuple((start, start) for start, _ in own)
            weight = _weight(contents, fragment, own, job.me)
            contents.weights[name] = weight.model_copy(update={"kind": kind})


def _is_written_here(holding: Holding, job: Communicator) -> bool:
    """Whether this process writes its part of what no optimizer trains; one of its holders does."""
    if holding.replicated:
        return job.me == 0
    in_first = has_first_process(holding.processes or ranks_of(holding.group), job)
    return in_first and all(map(is_first_process, holding.copies))


def held_untrained(name: str, tensor: Tensor) -> Holding:
    """Returns this process's part of a parameter or buffer that no optimizer trains."""
    for adapter in adapters():
        holding = adapter.untrained(name, tensor)
        if holding is not None:
            return holding
    whole = Fragment(name, tuple(tensor.shape), 0, tensor.numel(), tensor, lambda all_: all_)
    return Holding([whole], None, replicated=True)


def local_values(fragment: Fragment) -> Tensor:
    """Returns the local values of a fragment, in its row-major order."""
    return fragment.view(fragment.target.detach())


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a type as the index stores it, e.g. ``float32``."""
    return str(dtype).removeprefix("torch.")


def shape_in(fragment: Fragment) -> tuple[int, ...]:
    """Shape of a parameter as it is stored: flattened, if processes hold ranges of its elements."""
    is_flat = len(fragment.held) == 1
    return (math.prod(fragment.shape),) if is_flat else fragment.shape


def _weight(contents: Contents, fragment: Fragment, own: Box, process: int) -> Weight:
    """Adds a part of what is held of a parameter."""
    local = local_values(fragment).reshape(tuple(map(row_count, fragment.held)))
    values, key = local[within(own, fragment.held)], tensor_key("weight", fragment.name)
    return Weight(
        shape=fragment.parameter_shape,
        transposed=fragment.transposed,
        elements=contents.slice_of(key, process, own, shape_in(fragment), values),
        kind="trained",
    )
