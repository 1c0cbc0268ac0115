"""Temporary memory of every process in a step, recorded once for each kind of process."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from arg_dist.algorithm import LowRankUpdate, adam_step
from arg_dist.config import AdaRankGradConfig
from arg_dist.planning.allocations import Point, points_of
from arg_dist.planning.rows import Counts, Spans
from arg_dist.planning.shardings import PlannedMatrix, PlannedTensor
from arg_dist.planning.traffic import AtHome, matrix_requests
from arg_dist.recording import recorded_step
from arg_dist.sharding.drivers import Round, run_recorded
from arg_dist.step import GradientPart
from arg_dist.subspace.state import State

DTYPES = {2: torch.bfloat16, 4: torch.float32}
"""Types of the weights and gradients that the optimizer receives, by their bytes."""


class Memory(NamedTuple):
    """``points x owners``: the fields of :class:`Point` at each request, and with the update."""

    held: Counts
    passing: Counts

    @staticmethod
    def of(points: Sequence[Sequence[Point]]) -> Memory:
        """From the points of each owner."""
        both = np.array(points, dtype=np.int64)  # owners x points x 2
        return Memory(both[:, :, 0].T, both[:, :, 1].T)


Steps = tuple[Sequence[Point], Sequence[Point]]
"""Points of the first step, and of a step without a refresh."""


@dataclass(frozen=True)
class Kind:
    """Processes that hold equally much at every point, of any planned.

    Attributes:
        sizes: all that decides it; see :func:`_sizes`.
        is_home: whether it is the home process.
        planned: a planned with such an owner.
        me: that owner.
    """

    sizes: tuple[int, ...]
    is_home: bool
    planned: PlannedMatrix = field(compare=False)
    me: int = field(compare=False)


@dataclass(frozen=True, eq=False)
class MatrixMemory:
    """Temporary memory of the owners of a matrix.

    Attributes:
        planned: how it is sharded.
        settings: its settings.
        rank: rank of its basis.
        dtype: type of its weights and gradients.
    """

    planned: PlannedMatrix
    settings: AdaRankGradConfig
    rank: int
    dtype: torch.dtype

    def with_home(self, home: int, *, is_first: bool) -> Memory:
        """Of all owners in the first step, or in one without a refresh.

        Args:
            home: the home process, as an index into the owners.
            is_first: whether this is the first step.
        """
        at_home = self._steps(home, is_home=True)[not is_first]
        if self.planned.owners == 1:
            return Memory.of([at_home])
        held, passing = (each.copy() for each in self._elsewhere[not is_first])
        held[:, home], passing[:, home] = np.array(at_home).T
        return Memory(held, passing)

    @cached_property
    def _elsewhere(self) -> tuple[Memory, Memory]:
        """Of all owners, none of which is the home process."""
        _, firsts, kinds = np.unique(self._sizes, axis=0, return_index=True, return_inverse=True)
        found = [self._steps(int(me), is_home=False) for me in firsts]
        first, steady = (Memory.of([steps[k] for steps in found]) for k in range(2))
        kinds = kinds.reshape(-1)
        return (
            Memory(first.held[:, kinds], first.passing[:, kinds]),
            Memory(steady.held[:, kinds], steady.passing[:, kinds]),
        )

    def _steps(self, me: int, *, is_home: bool) -> Steps:
        kind = Kind(tuple(self._sizes[me].tolist()), is_home, self.planned, me)
        return _recorded(kind, self.settings, self.rank, self.dtype)

    @cached_property
    def _sizes(self) -> Counts:
        """``owners x sizes``: everything on which an owner's temporary memory depends."""
        planned = self.planned
        sharding, is_cut = planned.sharding, planned.splits_rows
        sides = (sharding.moment, sharding.basis, sharding.elements)
        rows = [rows for side in sides for rows in (side.touch, side.keep, side.update)]
        rows.append(sharding.store)
        terms = 1 if sharding.terms is None else sharding.terms.count
        common = [planned.rows, planned.columns, planned.spans_columns, planned.replicated, terms]
        for request in matrix_requests(planned, self.settings, self.rank):
            for transfer in (each for made in request for each in made.transfers):
                both = (transfer.have, transfer.want)
                rows += [each for each in both if not isinstance(each, AtHome)]
                common.append(transfer.row_bytes)
        sizes = [Spans.of(each).counts() for each in rows]
        same = [np.full(planned.owners, each) for each in common]
        return np.stack([*sizes, *is_cut.T, *same], 1).astype(np.int64)


@lru_cache(maxsize=4096)
def matrix_memory(
    planned: PlannedMatrix, settings: AdaRankGradConfig, rank: int, size: int
) -> MatrixMemory:
    """Temporary memory of a matrix.

    Args:
        planned: how it is sharded.
        settings: its settings.
        rank: rank of its basis.
        size: bytes per element of its weights and gradients.
    """
    return MatrixMemory(planned, settings, rank, DTYPES[size])


@lru_cache(maxsize=4096)
def tensor_memory(planned: PlannedTensor, settings: AdaRankGradConfig, size: int) -> Memory:
    """Temporary memory of a tensor; arguments as of :func:`matrix_memory`."""
    both = np.stack([planned.held, planned.kept], 1)
    _, firsts, kinds = np.unique(both, axis=0, return_index=True, return_inverse=True)
    found = [_recorded_adam(planned, int(me), settings, DTYPES[size]) for me in firsts]
    held, passing = Memory.of(found)
    return Memory(held[:, kinds.reshape(-1)], passing[:, kinds.reshape(-1)])


@lru_cache(maxsize=16384)
def _recorded(kind: Kind, settings: AdaRankGradConfig, rank: int, dtype: torch.dtype) -> Steps:
    shard = kind.planned.shard(kind.me, is_home=kind.is_home, dtype=dtype)
    state: State = {}

    def steps(gradient: GradientPart) -> Generator[Round, None, LowRankUpdate | None]:
        assert gradient.row_sq is not None
        return recorded_step(gradient.read, gradient.row_sq, state, shard.sharding, settings, rank)

    return points_of(shard, steps, state, settings), points_of(shard, steps, state, settings)


def _recorded_adam(
    planned: PlannedTensor, me: int, settings: AdaRankGradConfig, dtype: torch.dtype
) -> list[Point]:
    shard = planned.shard(me, dtype)
    state: State = {}

    def steps(gradient: GradientPart) -> Generator[Round, None, Tensor]:
        return run_recorded(adam_step(gradient.read(), state, shard.sharding, settings, me=me), me)

    points_of(shard, steps, state, settings)  # makes the state
    return points_of(shard, steps, state, settings)
