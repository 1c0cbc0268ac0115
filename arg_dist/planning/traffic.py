"""What each process sends and receives in a step, from recorded steps (:mod:`arg_dist.recording`).

All numbers are per process, in the order of the owners of a matrix or tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from arg_dist.config import AdaRankGradConfig
from arg_dist.planning.allocations import Unfilled
from arg_dist.planning.rows import Counts, Spans, sent
from arg_dist.planning.shardings import PlannedMatrix, PlannedTensor
from arg_dist.recording import requests_of_a_step, requests_of_adam
from arg_dist.sharding.drivers import Round, Transfer
from arg_dist.sharding.routing import Kind, even_route
from arg_dist.subspace.distributed import KnownRows, MatrixSharding, Rows
from arg_dist.subspace.state import State


class Moved(NamedTuple):
    """Bytes per process in a round.

    Attributes:
        sent: to other processes.
        received: from them.
        answer: of the resulting tensors; what comes from one process alone stays where it was
            received, and makes no other.
        crossing: of those sent, to processes of other copies of the model.
    """

    sent: Counts
    received: Counts
    answer: Counts
    crossing: Counts


class AtHome(KnownRows):
    """Rows on the home process, whichever that is, and none elsewhere."""

    def with_home(self, home: int) -> Spans:
        """The same rows on the process `home`."""
        return Spans.at(home, len(self), max(high for _, high in self))


class AnyHome(MatrixSharding):
    """A sharding that marks the rows at home, so that one recording serves every home process."""

    def at_home(self, size: int) -> Rows:
        """All of `size` rows on the home process, none elsewhere."""
        return AtHome(super().at_home(size))


def _for_any_home(sharding: MatrixSharding) -> AnyHome:
    terms = sharding.terms
    if terms is not None and terms.averaged is not None:
        sharding = replace(sharding, terms=replace(terms, averaged=_for_any_home(terms.averaged)))
    return AnyHome(*(getattr(sharding, each.name) for each in fields(sharding)))


@dataclass(frozen=True, eq=False)
class Request:
    """What one request of a matrix or tensor transfers, with any process as home.

    Attributes:
        transfers: what it transfers.
        copies: copies of the model, each of which has as many of the processes.
        by_all: every process of the group is an owner, so that parts may be padded.
    """

    transfers: Round
    copies: int = 1
    by_all: bool = True

    def moved(self, home: int = 0) -> Moved:
        """The bytes that it moves.

        Args:
            home: the home process, as an index into the owners.
        """
        return self._moved_with(home) if self._goes_home else self._moved_anyway

    @cached_property
    def _goes_home(self) -> bool:
        return any(isinstance(rows, AtHome) for each in self.transfers for rows in each[:2])

    @cached_property
    def _moved_anyway(self) -> Moved:
        return self._moved_with(0)

    def _moved_with(self, home: int) -> Moved:
        moved = [self._moved(each, home) for each in self.transfers]
        return Moved(*(np.sum(parts, 0) for parts in zip(*moved, strict=True)))

    def _moved(self, transfer: Transfer, home: int) -> Moved:
        row_bytes = transfer.row_bytes
        have, want = (
            each.with_home(home) if isinstance(each, AtHome) else Spans.of(each)
            for each in (transfer.have, transfer.want)
        )
        several = np.count_nonzero(have.counts())
        answer = row_bytes * want.counts() * (several if transfer.stacked else several > 1)
        if self.by_all:
            have, want = _as_sent(transfer, home) or (have, want)
        total = sent(have, want, row_bytes)
        pairs = zip(have.divided(self.copies), want.divided(self.copies), strict=True)
        within = np.concatenate([sent(*pair, row_bytes) for pair in pairs])
        return Moved(total, sent(want, have, row_bytes), answer, total - within)


class Requests(NamedTuple):
    """The requests of the first step, which finds a basis, and of a step without a refresh."""

    first: Sequence[Request]
    steady: Sequence[Request]


@lru_cache(maxsize=4096)
def matrix_requests(planned: PlannedMatrix, settings: AdaRankGradConfig, rank: int) -> Requests:
    """What the steps of a matrix request, with a basis of `rank` columns."""
    marked = _for_any_home(planned.sharding)
    state: State = {}

    def requests() -> list[Request]:
        found = requests_of_a_step(state, marked, settings, rank)
        return [Request(each, _copies(planned), planned.by_all) for each in found]

    with Unfilled():
        return Requests(requests(), requests())


@lru_cache(maxsize=4096)
def matrix_traffic(
    planned: PlannedMatrix, settings: AdaRankGradConfig, rank: int, home: int, *, is_first: bool
) -> list[Moved]:
    """What each round of a matrix moves, in its first step or in one without a refresh."""
    requests = matrix_requests(planned, settings, rank)
    return [each.moved(home) for each in (requests.first if is_first else requests.steady)]


@lru_cache(maxsize=4096)
def tensor_traffic(planned: PlannedTensor, settings: AdaRankGradConfig) -> list[Moved]:
    """What each round of a tensor that Adam trains moves."""
    requests = requests_of_adam(planned.sharding, settings)
    return [Request(each, _copies(planned), planned.by_all).moved() for each in requests]


def _copies(planned: PlannedMatrix | PlannedTensor) -> int:
    return 1 if planned.copy_of is None else max(planned.copy_of) + 1


def _as_sent(transfer: Transfer, home: int) -> tuple[Spans, Spans] | None:
    """The rows that processes have and want, with those that pad parts; None if none do."""
    route = even_route(transfer.have, transfer.want)
    if route is None or not route.cut:
        return None
    processes = len(route.cut)
    size = processes * route.count
    first = route.count * np.arange(processes)
    parts = Spans(first, first + route.count)
    if route.kind in (Kind.TO_HOME, Kind.FROM_HOME):
        whole = Spans.at(home, processes, size)
    else:
        whole = Spans(np.zeros(processes, np.int64), np.full(processes, size))
    return (whole, parts) if route.kind in (Kind.PARTS, Kind.FROM_HOME) else (parts, whole)
