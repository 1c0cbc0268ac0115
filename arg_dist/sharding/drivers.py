"""Drivers that carry out a computation's requests: locally, in lockstep, or over processes.

All three add contributions in the order of the processes, so their results are bitwise equal,
independent of the transport. A fourth carries out nothing: it tells what would be sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.overlap import Answer, Lane, run_lanes
from arg_dist.subspace.distributed import (
    Exchange,
    Request,
    Rows,
    Steps,
    add_up,
    advance,
    contributors,
    exchanges_of,
    intersect,
    row_count,
)

T = TypeVar("T")


def run(
    computations: Sequence[Steps[T]],
    communicator: Communicator,
    rounds: int,
    purpose: str,
    names: Sequence[str],
) -> list[T]:
    """:func:`run_collective`, or :func:`run_local` for each computation of a single process."""
    if communicator.size == 1:
        return [run_local(steps) for steps in computations]
    return run_collective(computations, communicator, rounds, purpose, names)


def run_local(steps: Steps[T]) -> T:
    """Run a computation in which one process holds everything."""
    results: dict[int, T] = {}
    run_together([steps], results.__setitem__)
    return results[0]


def run_together(computations: Sequence[Steps[T]], finish: Callable[[int, T], None]) -> None:
    """Run computations in which one process holds everything, side by side.

    Args:
        computations: the computations.
        finish: called with the position and the result of each one, as soon as it has that.
    """
    numbered = dict(enumerate(computations))
    answers: dict[int, Answer | None] = dict.fromkeys(numbered)
    while answers:
        requests = advance(numbered, answers, finish)
        answers = {
            i: _answer(request, [exchanges_of(request)], 0) for i, request in requests.items()
        }


def run_lockstep(shards: Sequence[Steps[T]]) -> list[T]:
    """Run one computation as N shards inside this process; shard `i` stands for process `i`.

    For tests of sharding without multiple processes.

    Raises:
        RuntimeError: some shards have requests after others have finished; with real processes,
            this would hang.
    """
    results: dict[int, T] = {}
    answers: list[Answer | None] = [None] * len(shards)
    while True:
        # each by itself, as the work of different processes is not done together
        requests: list[Request] = []
        for i, shard in enumerate(shards):
            requests += advance({i: shard}, {i: answers[i]}, results.__setitem__).values()
        if len(results) == len(shards):
            return [results[i] for i in range(len(shards))]
        if results:
            raise RuntimeError(
                f"{len(results)} of {len(shards)} shards have finished, but the others still have "
                "requests"
            )
        parts = [exchanges_of(request) for request in requests]
        answers = [_answer(requests[i], parts, i) for i in range(len(shards))]


def run_collective(
    computations: Sequence[Steps[T]],
    communicator: Communicator,
    rounds: int,
    purpose: str = "a computation",
    names: Sequence[str] = (),
) -> list[T]:
    """Run all computations together over real processes, with one collective per round.

    Args:
        computations: this process's computations; processes list shared ones in the same relative
            order.
        communicator: the group.
        rounds: number of rounds that every process of the group takes part in; at least as many as
            any of its computations requests.
        purpose: description of the computations for error messages.
        names: names of their matrices, one each.

    Raises:
        NoAnswerError: other processes did not join a round in time, or have terminated.
        RuntimeError: a computation requests more than `rounds` rounds.
    """
    results: dict[int, T] = {}
    lane: Lane[T] = Lane(computations, results.update, purpose, names)
    run_lanes([lambda: lane], communicator, [rounds])
    return [results[i] for i in range(len(results))]


class Transfer(NamedTuple):
    """An exchange without its data; equal on every process that takes part.

    Attributes:
        have: rows that each process contributes to.
        want: rows that each process receives.
        row_bytes: bytes of one row.
        stacked: as of :class:`arg_dist.subspace.distributed.Exchange`.
    """

    have: Rows
    want: Rows
    row_bytes: int
    stacked: bool = False

    def answer_bytes(self, me: int) -> int:
        """Bytes that process `me` receives, together with its own."""
        several = contributors(self.have, self.want[me]) if self.stacked else 1
        return several * row_count(self.want[me]) * self.row_bytes


Round = tuple[Transfer, ...]
"""What one request transfers."""


def run_recorded(steps: Steps[T], me: int) -> Generator[Round, None, T]:
    """Run the computation of process `me` on meta tensors, alone; yields what each request moves.

    Nothing is sent and nothing is computed: an answer has the shape and type of the real one.

    Args:
        steps: the computation; it reads no values.
        me: index of the process it stands for.
    """
    results: dict[int, T] = {}
    answers: dict[int, Answer | None] = {me: None}
    while True:
        requests = advance({me: steps}, answers, results.__setitem__)
        if results:
            return results[me]
        yield tuple(_transfer(exchange) for exchange in exchanges_of(requests[me]))
        answers[me] = _unfilled(requests.pop(me), me)


def _transfer(exchange: Exchange) -> Transfer:
    part = exchange.part
    row_bytes = math.prod(part.shape[1:]) * part.element_size()
    return Transfer(exchange.have, exchange.want, row_bytes, exchange.stacked)


def _unfilled(request: Request, me: int) -> Answer:
    def rows(exchange: Exchange) -> Tensor:
        low, high = exchange.want[me]
        shape = (max(0, high - low), *exchange.part.shape[1:])
        several = (contributors(exchange.have, (low, high)),) if exchange.stacked else ()
        return exchange.part.new_empty(*several, *shape)

    return tuple(map(rows, request)) if isinstance(request, tuple) else rows(request)


def _answer(request: Request, parts: Sequence[tuple[Exchange, ...]], me: int) -> Answer:
    answers = []
    for k, exchange in enumerate(exchanges_of(request)):
        contributions = []
        for i, others in enumerate(parts):
            if k >= len(others):  # no part in this matrix; it only takes part in the round
                continue
            other = others[k]
            low, high = intersect(other.have[i], exchange.want[me])
            if low < high:
                start = other.have[i][0]
                contributions.append((low, other.part[low - start : high - start]))
        answers.append(add_up(exchange, me, contributions))
    return tuple(answers) if isinstance(request, tuple) else answers[0]
