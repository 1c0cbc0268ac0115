"""State sizes, ranks and traffic of the optimizer: on this process, and on all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from statistics import fmean
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from arg_dist.sharding.entry import entry_point
from arg_dist.sharding.plan import Plan
from arg_dist.sharding.shard import MatrixShard, Shard, local_part
from arg_dist.subspace.state import State, progress

ADAMW_BYTES_PER_ELEMENT = 8
"""AdamW's two fp32 moments."""


# -- on this process ------------------------------------------------------------------------------


def matrix_figures(
    plans: Iterable[Plan], state_of: Callable[[Shard], State]
) -> list[dict[str, Any]]:
    """The entries of :meth:`arg_dist.AdaRankGrad.stats`."""
    # a matrix is in several plans if groups were added or parameters frozen during training
    shards = {shard.name: shard for plan in plans for shard in plan.shards}
    return [
        {
            "name": shard.name,
            "shape": shard.shape,
            "side": shard.side_name,
            **progress(state),
            "state_bytes": storage_bytes([state]),
        }
        for shard in shards.values()
        if isinstance(shard, MatrixShard) and (state := state_of(shard))
    ]


def held_elements(plans: Iterable[Plan]) -> int:
    """Numbers (a complex element has two) that this process holds; several plans may have them."""
    parts = [part for plan in plans for part in plan.held]
    held = {part.name: (part.stop - part.start) * part.width for part in parts}
    return sum(held.values())


def storage_bytes(states: Iterable[Any]) -> int:
    """Bytes of all distinct storages that the tensors in nested dictionaries reference."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            for inner in value.values():
                visit(inner)

    for state in states:
        visit(state)
    return sum(storages.values())


# -- on all processes -----------------------------------------------------------------------------


@runtime_checkable
class ReportsItself(Protocol):
    """An optimizer that reports its own figures, as :class:`arg_dist.AdaRankGrad` does."""

    def stats(self) -> list[dict[str, Any]]:
        """Name, rank, energy and more of each matrix that this process holds a part of."""

    def state_bytes(self) -> int:
        """Bytes of optimizer state on this process."""

    def comm_bytes(self) -> int:
        """Bytes sent so far by this process's optimizer."""

    def collectives(self) -> int:
        """Collectives in which this process's optimizer has participated so far."""

    def held_elements(self) -> int:
        """Parameter elements that this process's optimizer is responsible for."""


class Numbers(NamedTuple):
    """Figures of one process: those of :class:`ReportsItself`, and AdamW's state bytes."""

    stats: list[dict[str, Any]]
    state_bytes: int
    adamw_bytes: int
    sent_bytes: int = 0
    collectives: int = 0


@dataclass(frozen=True)
class OptimizerSample:
    """The optimizer over all processes at one step; lists are indexed by process.

    `low_rank_bytes` is the state of the low-rank matrices on all processes together, and
    `low_rank_adamw_bytes` what AdamW would keep for them. `collectives` is the maximum over the
    processes.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    energy: dict[str, float] = field(default_factory=dict)
    state_bytes: list[int] = field(default_factory=list)
    adamw_bytes: list[int] = field(default_factory=list)
    sent_bytes: list[int] = field(default_factory=list)
    collectives: int = 0
    low_rank_bytes: int = 0
    low_rank_adamw_bytes: int = 0

    @property
    def mean_rank(self) -> float | None:
        """Mean rank of the low-rank matrices; None if there are none."""
        return fmean(self.ranks.values()) if self.ranks else None

    @property
    def largest_share(self) -> float | None:
        """State as a share of AdamW's, on the process where that share is largest."""
        pairs = zip(self.state_bytes, self.adamw_bytes, strict=True)
        return max((own / adamw for own, adamw in pairs if adamw), default=None)


@entry_point
def sample_optimizer(optimizer: Optimizer) -> OptimizerSample:
    """Gathers the figures of `optimizer`; a collective: all processes call it at the same step."""
    own = _own_numbers(optimizer)
    gathered: list[Any] = [own]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
    return merge(gathered)


def _own_numbers(optimizer: Optimizer) -> Numbers:
    if isinstance(optimizer, ReportsItself):
        return Numbers(
            optimizer.stats(),
            optimizer.state_bytes(),
            ADAMW_BYTES_PER_ELEMENT * optimizer.held_elements(),
            optimizer.comm_bytes(),
            optimizer.collectives(),
        )
    state_bytes = sum(
        local_part(value).untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.dim() > 0  # not the step counters
    )
    return Numbers([], state_bytes, state_bytes)


def merge(gathered: Sequence[Numbers]) -> OptimizerSample:
    """Combines the figures of all processes into one sample.

    Each process that holds a part of a matrix reports it. Its rank and energy are the same on all
    of them, so the first report is used.
    """
    matrices: dict[str, dict[str, Any]] = {}
    for numbers in gathered:
        for matrix in numbers.stats:
            matrices.setdefault(matrix["name"], matrix)
    # before its first refresh a matrix has no rank
    known = {name: matrix for name, matrix in sorted(matrices.items()) if matrix["rank"]}
    return OptimizerSample(
        ranks={name: matrix["rank"] for name, matrix in known.items()},
        energy={name: matrix["energy"] for name, matrix in known.items()},
        state_bytes=[numbers.state_bytes for numbers in gathered],
        adamw_bytes=[numbers.adamw_bytes for numbers in gathered],
        sent_bytes=[numbers.sent_bytes for numbers in gathered],
        collectives=max(numbers.collectives for numbers in gathered),
        low_rank_bytes=sum(part["state_bytes"] for numbers in gathered for part in numbers.stats),
        low_rank_adamw_bytes=ADAMW_BYTES_PER_ELEMENT
        * sum(prod(matrix["shape"]) for matrix in matrices.values()),
    )
