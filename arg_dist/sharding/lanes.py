"""Communication behind computing: while the messages of some matrices are under way, others step.

Computations that go through the rounds together are a lane. Two lanes take turns, and what needs no
other process is done while a lane's first messages are under way. In what order the processes send
follows from the number of rounds of each lane alone, so that it is the same on all of them.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.waiting import named
from arg_dist.subspace.exchange import Request, Steps, exchanges_of

T = TypeVar("T")
Answer = Tensor | tuple[Tensor, ...]

AT_ONCE = 2
"""Lanes that are under way at a time."""
WORTH_IT = 32 * 2**20
"""Bytes of weights from which on computing hides more than further messages cost."""


def lanes_of(sizes: Sequence[int], bucket_size: int) -> list[range]:
    """Positions, in order, cut into lanes.

    Those that are under way together hold at most `bucket_size`, and there are as few as that
    allows, but enough to take turns where that is worth it. Something too large is a lane of its
    own.

    Args:
        sizes: bytes of fp32 weights of each matrix and tensor.
        bucket_size: bytes that may be under way at a time.
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
    """The order in which lanes go on, one ``(lane, turn)`` after the other.

    A lane begins at turn 0, at which it sends its first messages; at turn k it takes the answers of
    its k-th ones, and sends the next; in its last turn it sends none.

    Args:
        rounds: of each lane.
    """
    under_way: deque[tuple[int, int]] = deque()
    following = iter(range(len(rounds)))
    while True:
        lane = next(following, None) if len(under_way) < AT_ONCE else None
        if lane is not None:
            turn = 0
        elif under_way:
            lane, turn = under_way.popleft()
        else:
            return
        yield lane, turn
        if turn < rounds[lane]:
            under_way.append((lane, turn + 1))


class Lane(Generic[T]):
    """Computations that go through the rounds together, in one message a round for all of them.

    Args:
        computations: this process's. Processes that share one list it in the same relative order.
        finish: called with the position and the result of each computation, when the next messages
            are under way.
        purpose: what they are, in the words of an error.
        names: of the matrices that they are for, one each.
        meanwhile: what else there is to do, while the first messages are under way.
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
        self._under_way: Callable[[], list[Tensor]] = list

    def go_on(self, turn: int, communicator: Communicator, rounds: int) -> None:
        """Takes one turn.

        Args:
            turn: which one, see :func:`turns`.
            communicator: the group.
            rounds: of this lane; every process of the group takes part in all of them.

        Raises:
            NoAnswerError: other processes did not come to a round in time, or are gone.
            RuntimeError: a computation asks for more than `rounds` rounds.
        """
        ended: list[tuple[int, T]] = []
        if turn == 0:
            for i in range(len(self._computations)):
                self._advance(i, None, ended)
        else:
            self._hand_out(ended)
        if turn < rounds:
            exchanges = [e for request in self._pending.values() for e in exchanges_of(request)]
            words = self._words(turn + 1, rounds)
            self._under_way = communicator.begin(exchanges, words)
        elif self._pending:
            raise RuntimeError(
                f"{len(self._pending)} computations still ask after {rounds} rounds: the number of "
                "rounds that was agreed between the processes is too small"
            )
        if turn == 0:
            self._meanwhile()
        while ended:
            self._finish(*ended.pop(0))

    def _hand_out(self, ended: list[tuple[int, T]]) -> None:
        under_way, self._under_way = self._under_way, list
        answers = iter(under_way())
        del under_way  # and with it the messages
        for i, request in list(self._pending.items()):
            mine = tuple(next(answers) for _ in exchanges_of(request))
            self._advance(i, mine if isinstance(request, tuple) else mine[0], ended)

    def _advance(self, i: int, answer: Answer | None, ended: list[tuple[int, T]]) -> None:
        steps = self._computations[i]
        try:
            self._pending[i] = next(steps) if answer is None else steps.send(answer)
        except StopIteration as finished:
            self._pending.pop(i, None)
            ended.append((i, finished.value))

    def _words(self, number: int, rounds: int) -> Callable[[], str]:
        where = self._purpose
        if rounds > 1:
            where = f"round {number} of {rounds} of {where}"
        asking = [self._names[i] for i in self._pending] if self._names else []
        return lambda: f"{where} for {named(asking)}" if self._names else where


def run_lanes(
    lanes: Sequence[Callable[[], Lane[T]]], communicator: Communicator, rounds: Sequence[int]
) -> None:
    """Runs all lanes over real processes.

    Args:
        lanes: what makes each of them, called when it is its turn; as many on every process.
        communicator: the group.
        rounds: of each lane; every process of the group takes part in all of them. At least as many
            as any of the lane's computations asks for.

    Raises:
        NoAnswerError: other processes did not come to a round in time, or are gone.
        RuntimeError: a computation asks for more rounds than its lane has.
    """
    under_way: dict[int, Lane[T]] = {}
    for number, turn in turns(rounds):
        lane = under_way.pop(number) if turn else lanes[number]()
        lane.go_on(turn, communicator, rounds[number])
        if turn < rounds[number]:
            under_way[number] = lane
