"""Overlap of communication and computation by interleaving lanes of matrices.

A lane is a group of matrices whose collectives are batched: their computations go through the
rounds together. Two lanes alternate: one computes while the other's messages are in flight.
Computations that need no other process run while a lane's first messages are in flight. The order
of the collectives depends only on the number of rounds of each lane, so it is equal on all
processes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.timeouts import named
from arg_dist.subspace.distributed import Request, Steps, exchanges_of

T = TypeVar("T")
Answer = Tensor | tuple[Tensor, ...]

AT_ONCE = 2
"""Lanes in flight at a time."""
WORTH_IT = 32 * 2**20
"""Bytes of weights above which overlap saves more than the additional messages cost."""


def lanes_of(sizes: Sequence[int], bucket_size: int) -> list[range]:
    """Divide the positions, in order, into lanes.

    Lanes in flight together hold at most `bucket_size`. There are as few lanes as that allows, but
    enough to alternate if overlap is worthwhile. An item that is too large is its own lane.

    Args:
        sizes: bytes of fp32 weights of each matrix and tensor.
        bucket_size: bytes that may be in flight at a time.
    """
    limit, through = bucket_size // AT_ONCE, list(itertools.accumulate(sizes))
    if through and through[-1] >= WORTH_IT:
        limit = min(limit, next(size for size in through if AT_ONCE * size >= through[-1]))
    starts, filled = [0], 0
    for position, size in enumerate(sizes):
        if filled and filled + size > limit:
            starts.append(position)
            filled = 0
        filled += size
    return [range(*ends) for ends in itertools.pairwise([*starts, len(sizes)])]


def turns(rounds: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The order in which lanes proceed, as successive ``(lane, turn)``.

    At turn 0 a lane sends its first messages; at turn k it receives the answers of its k-th round
    and sends the next; at its last turn it sends none.

    Args:
        rounds: rounds of each lane.
    """
    in_flight: deque[tuple[int, int]] = deque()
    following = iter(range(len(rounds)))
    while True:
        lane = next(following, None) if len(in_flight) < AT_ONCE else None
        if lane is not None:
            turn = 0
        elif in_flight:
            lane, turn = in_flight.popleft()
        else:
            return
        yield lane, turn
        if turn < rounds[lane]:
            in_flight.append((lane, turn + 1))


class Lane(Generic[T]):
    """Computations that go through the rounds together, with one collective per round.

    Args:
        computations: this process's computations; processes list shared ones in the same relative
            order.
        finish: called with the position and the result of each computation, once the next messages
            are in flight.
        purpose: description of the computations for error messages.
        names: names of their matrices, one each.
        meanwhile: additional work to do while the first messages are in flight.
    """

    def __init__(
        self,
        computations: Iterable[Steps[T]],
        finish: Callable[[int, T], None],
        purpose: str = "a computation",
        names: Sequence[str] = (),
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        self._computations = list(computations)
        self._finish = finish
        self._purpose = purpose
        self._names = names
        self._meanwhile = meanwhile
        self._pending: dict[int, Request] = {}
        self._in_flight: Callable[[], list[Tensor]] = list

    def go_on(self, turn: int, communicator: Communicator, rounds: int) -> None:
        """Take one turn.

        Args:
            turn: number of the turn, see :func:`turns`.
            communicator: the group.
            rounds: rounds of this lane; every process of the group takes part in all of them.

        Raises:
            NoAnswerError: other processes did not join a round in time, or have terminated.
            RuntimeError: a computation requests more than `rounds` rounds.
        """
        done: list[tuple[int, T]] = []
        if turn == 0:
            for i in range(len(self._computations)):
                self._advance(i, None, done)
        else:
            self._deliver(done)
        if turn < rounds:
            exchanges = [e for request in self._pending.values() for e in exchanges_of(request)]
            words = self._purpose_of_round(turn + 1, rounds)
            self._in_flight = communicator.begin(exchanges, words)
        elif self._pending:
            raise RuntimeError(
                f"{len(self._pending)} computations still have requests after {rounds} rounds: the "
                "number of rounds agreed between the processes is too small"
            )
        if turn == 0:
            self._meanwhile()
        while done:
            self._finish(*done.pop(0))

    def _deliver(self, done: list[tuple[int, T]]) -> None:
        in_flight, self._in_flight = self._in_flight, list
        answers = iter(in_flight())
        del in_flight  # releases the message buffers
        for i, request in list(self._pending.items()):
            mine = tuple(next(answers) for _ in exchanges_of(request))
            self._advance(i, mine if isinstance(request, tuple) else mine[0], done)

    def _advance(self, i: int, answer: Answer | None, done: list[tuple[int, T]]) -> None:
        steps = self._computations[i]
        try:
            self._pending[i] = next(steps) if answer is None else steps.send(answer)
        except StopIteration as finished:
            self._pending.pop(i, None)
            done.append((i, finished.value))

    def _purpose_of_round(self, number: int, rounds: int) -> Callable[[], str]:
        where = self._purpose
        if rounds > 1:
            where = f"round {number} of {rounds} of {where}"
        waiting = [self._names[i] for i in self._pending] if self._names else []
        return lambda: f"{where} for {named(waiting)}" if self._names else where


def run_lanes(
    lanes: Sequence[Callable[[], Lane[T]]], communicator: Communicator, rounds: Sequence[int]
) -> None:
    """Run all lanes over real processes.

    Args:
        lanes: functions that create the lanes, called when each starts; equally many on every
            process.
        communicator: the group.
        rounds: rounds of each lane, at least as many as any of its computations requests; every
            process of the group takes part in all of them.

    Raises:
        NoAnswerError: other processes did not join a round in time, or have terminated.
        RuntimeError: a computation requests more rounds than its lane has.
    """
    in_flight: dict[int, Lane[T]] = {}
    for number, turn in turns(rounds):
        lane = in_flight.pop(number) if turn else lanes[number]()
        lane.go_on(turn, communicator, rounds[number])
        if turn < rounds[number]:
            in_flight[number] = lane
