"""Three ways to carry out what the mathematics asks for: alone, in lockstep, over processes.

All three hand a process the sum of the contributions in the order of the processes, so that they
agree to the bit, whatever carries the messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.lanes import Answer, Lane, run_lanes
from arg_dist.subspace.exchange import Exchange, Request, Steps, add_up, exchanges_of, intersect

T = TypeVar("T")


def run(
    computations: Sequence[Steps[T]],
    communicator: Communicator,
    rounds: int,
    purpose: str,
    names: Sequence[str],
) -> list[T]:
    """:func:`run_collective`, or :func:`run_local` for each where a process is on its own."""
    if communicator.size == 1:
        return [run_local(steps) for steps in computations]
    return run_collective(computations, communicator, rounds, purpose, names)


def run_local(steps: Steps[T]) -> T:
    """Runs a computation in which one process holds everything."""
    try:
        request = next(steps)
        while True:
            request = steps.send(_answer(request, [exchanges_of(request)], 0))
    except StopIteration as finished:
        result: T = finished.value
        return result


def run_lockstep(shards: Sequence[Steps[T]]) -> list[T]:
    """Runs one computation as N shards inside this process; shard `i` is process `i`.

    For tests of sharding that need no processes.

    Raises:
        RuntimeError: if some shards ask while others have ended: with processes, a hang.
    """
    results: list[Any] = [None] * len(shards)
    answers: list[Answer | None] = [None] * len(shards)
    while True:
        requests: list[Request] = []
        ended = 0
        for i, shard in enumerate(shards):
            try:
                answer = answers[i]
                requests.append(next(shard) if answer is None else shard.send(answer))
            except StopIteration as finished:
                results[i] = finished.value
                ended += 1
        if ended == len(shards):
            return results
        if ended:
            raise RuntimeError(f"{ended} of {len(shards)} shards have ended, the others still ask")
        parts = [exchanges_of(request) for request in requests]
        answers = [_answer(requests[i], parts, i) for i in range(len(shards))]


def run_collective(
    computations: Sequence[Steps[T]],
    communicator: Communicator,
    rounds: int,
    purpose: str = "a computation",
    names: Sequence[str] = (),
) -> list[T]:
    """Runs all computations together over real processes: one collective per round for all of them.

    Args:
        computations: this process's computations. Processes that share one list it in the same
            relative order.
        communicator: the group.
        rounds: number of rounds that every process of the group takes part in; at least as many as
            any of its computations asks for.
        purpose: what they are, in the words of an error.
        names: of the matrices that they are for, one each.

    Raises:
        NoAnswerError: other processes did not come to a round in time, or are gone.
        RuntimeError: if a computation asks for more than `rounds` rounds.
    """
    results: list[Any] = [None] * len(computations)
    lane: Lane[T] = Lane(computations, results.__setitem__, purpose, names)
    run_lanes([lambda: lane], communicator, [rounds])
    return results


def _answer(request: Request, parts: Sequence[tuple[Exchange, ...]], me: int) -> Answer:
    answers = []
    for k, exchange in enumerate(exchanges_of(request)):
        contributions = []
        for i, others in enumerate(parts):
            if k >= len(others):  # it has no part in this matrix, and only goes along
                continue
            other = others[k]
            low, high = intersect(other.have[i], exchange.want[me])
            if low < high:
                start = other.have[i][0]
                contributions.append((low, other.part[low - start : high - start]))
        answers.append(add_up(exchange, me, contributions))
    return tuple(answers) if isinstance(request, tuple) else answers[0]
