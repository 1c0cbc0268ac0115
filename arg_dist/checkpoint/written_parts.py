"""What one process writes to a checkpoint: its slices of the optimizer's state and the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from arg_dist.checkpoint.index import CheckpointError, SlicedTensor, StateEntry, Weight, tensor_key
from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.fragment import Fragment, Holding, adapters
from arg_dist.sharding.job import has_first_process
from arg_dist.sharding.plan import Plan
from arg_dist.sharding.shard import MatrixShard, Shard
from arg_dist.state_dict import kept_parts
from arg_dist.subspace.distributed import Interval, even_part
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
        self, key: str, process: int, rows: Interval, shape: tuple[int, ...], values: Tensor
    ) -> SlicedTensor:
        """Registers `values` as rows `rows` of a tensor of that shape."""
        slices = []
        if rows[0] < rows[1]:
            self.tensors[key] = values
            slices.append((process, *rows))
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
            key = tensor_key("state", shard.name, part)
            tensors[part] = contents.slice_of(key, process, kept[shard.me], shape, values)
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


def refuse_blocks(plans: Iterable[Plan]) -> None:
    """Check that every process holds ranges of the parameters, which slices can be.

    Raises:
        CheckpointError: on every process: some are held in blocks of rows and columns.
    """
    for plan in plans:
        for fragment in plan.held:
            if fragment.box is not None:
                raise CheckpointError(
                    f"{fragment.name}: it is sharded over a mesh of two dimensions, which "
                    "arg_dist.checkpoint cannot save or load yet; save the model with "
                    "torch.distributed.checkpoint, and on each process "
                    "torch.save(optimizer.state_dict(), a file of its own)"
                )


def add_trained_weights(contents: Contents, plan: Plan, process: int) -> None:
    """Adds this process's part of the weights that a plan's optimizer trains."""
    for fragment in plan.held:
        held = fragment.start, fragment.stop
        written, me, copy_of = held, plan.communicator.me, plan.copy_of
        if plan.replicated:  # every process holds everything and writes an even part of it
            copy_of = tuple(range(plan.communicator.size))
        if copy_of is not None:
            written = even_part(held, copy_of[me], max(copy_of) + 1)
        values = local_values(fragment).reshape(-1)[written[0] - held[0] : written[1] - held[0]]
        contents.weights[fragment.name] = _weight(contents, fragment, written, values, process)


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
            if holding.replicated:
                writes = job.me == 0
            else:
                writes = has_first_process(Communicator(holding.group), job)
            held = (fragment.start, fragment.stop if writes else fragment.start)
            values = local_values(fragment).reshape(-1)[: held[1] - held[0]]
            weight = _weight(contents, fragment, held, values, job.me)
            contents.weights[name] = weight.model_copy(update={"kind": kind})


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


def _weight(
    contents: Contents, fragment: Fragment, held: Interval, values: Tensor, process: int
) -> Weight:
    key = tensor_key("weight", fragment.name)
    numel = (math.prod(fragment.shape),)
    return Weight(
        shape=fragment.parameter_shape,
        transposed=fragment.transposed,
        elements=contents.slice_of(key, process, held, numel, values),
        kind="trained",
    )
