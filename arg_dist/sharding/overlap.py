"""Overlap of communication and computation by interleaving lanes of matrices.

A lane is a group of matrices whose collectives are batched: their computations go through the
rounds together. Two lanes alternate: one computes while the other's messages are in flight.
Computations that need no other process run while a lane's first messages are in flight. The order
of the collectives depends only on the number of rounds of each lane, so it is equal on all
processes.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.timeouts import named
from arg_dist.subspace.distributed import (
    FP32_BYTES,
    DimensionSharding,
    MatrixSharding,
    Request,
    Steps,
    advance,
    exchanges_of,
)

T = TypeVar("T")
Answer = Tensor | tuple[Tensor, ...]

AT_ONCE = 2
"""Lanes in flight at a time."""
WORTH_IT = 32 * 2**20
"""Bytes of weights above which overlap saves more than the additional messages cost."""


class Load(NamedTuple):
    """Most bytes that a matrix or tensor has in the messages of one round, on one process.

    Attributes:
        weights: bytes of its weights in fp32, on all processes.
        everywhere: on each process that holds a part of it.
        at_home: on the home process, in the round in which that has all of it.
        home: the home process.
    """

    weights: int
    everywhere: int = 0
    at_home: int = 0
    home: int = 0


def load_of(
    sharding: MatrixSharding | DimensionSharding, rank: int = 0, *, goes_home: bool = False
) -> Load:
    """The load of a matrix, or of the elements of a tensor, in a step without a refresh.

    Args:
        sharding: how it is distributed over the processes.
        rank: the largest rank of a matrix.
        goes_home: the home process computes with all of the matrix, and all get its result.
    """
    elements = sharding if isinstance(sharding, DimensionSharding) else sharding.elements
    weights = FP32_BYTES * elements.size
    if not sharding.is_shared:
        return Load(weights)
    if isinstance(sharding, DimensionSharding):
        return Load(weights, FP32_BYTES * sharding.most_updated)
    moment = sharding.moment
    found = rank * (moment.most_touched + sharding.basis.most_touched)
    given = rank * moment.most_updated + elements.most_updated * goes_home
    whole = (elements.size + rank * sharding.basis.size) * goes_home
    return Load(weights, FP32_BYTES * max(found, given), FP32_BYTES * whole, sharding.home)


def lanes_of(loads: Sequence[Load], bucket_size: int) -> list[range]:
    """Divide the positions, in order, into lanes.

    Lanes in flight together have at most `bucket_size` in the messages of a round on any process,
    or twice as much as the largest item if that is more. There are as few lanes as that allows, but
    enough to alternate if overlap is worthwhile.

    Args:
        loads: of each matrix and tensor.
        bucket_size: bytes that a process may have in flight at a time.
    """
    most = max((max(load.everywhere, load.at_home) for load in loads), default=0)
    limit = max(bucket_size // AT_ONCE, most)
    through = list(itertools.accumulate(load.weights for load in loads))
    half = through[-1] / AT_ONCE if through and through[-1] >= WORTH_IT else math.inf
    starts, everywhere, at_home = [0], 0, Counter[int]()
    for position, load in enumerate(loads):
        filled = max(everywhere + load.everywhere, at_home[load.home] + load.at_home)
        is_halfway = len(starts) == 1 and through[position] > half
        if position > starts[-1] and (filled > limit or is_halfway):
            starts.append(position)
            everywhere, at_home = 0, Counter()
        everywhere += load.everywhere
        at_home[load.home] += load.at_home
    return [range(*ends) for ends in itertools.pairwise([*starts, len(loads)])]


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
        finish: called with results by position, once the next messages are in flight; may take
            them out.
        purpose: description of the computations for error messages.
        names: names of their matrices, one each.
        meanwhile: additional work to do while the first messages are in flight.
        batches: positions of computations whose work is done together; by default each is alone.
    """

    def __init__(
        self,
        computations: Iterable[Steps[T]],
        finish: Callable[[dict[int, T]], None],
        purpose: str = "a computation",
        names: Sequence[str] = (),
        meanwhile: Callable[[], None] = lambda: None,
        batches: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._computations = dict(enumerate(computations))
        self._batches = batches or [[i] for i in self._computations]
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
        results: dict[int, T] = {}
        answers: deque[Tensor] | None = None
        if turn:
            in_flight, self._in_flight = self._in_flight, list
            answers = deque(in_flight())
            del in_flight  # releases the message buffers
        for batch in self._batches:
            mine: dict[int, Answer | None] = dict.fromkeys(batch)
            if answers is not None:
                mine = {i: self._answer(i, answers) for i in batch if i in self._pending}
            self._pending |= advance(self._computations, mine, results.__setitem__)
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
        if results:
            self._finish(results)

    def _answer(self, i: int, answers: deque[Tensor]) -> Answer:
        request = self._pending.pop(i)
        mine = tuple(answers.popleft() for _ in exchanges_of(request))
        return mine if isinstance(request, tuple) else mine[0]

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
