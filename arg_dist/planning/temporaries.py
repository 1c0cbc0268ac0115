"""Peak temporary memory of one AdaRankGrad step, from recorded steps.

Matrices that one process holds whole are processed one at a time. The shared matrices of a lane go
through the rounds together, so their temporaries add up, and two lanes are in flight at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from arg_dist.planning.choices import FP32
from arg_dist.planning.memory import Memory, matrix_memory, tensor_memory
from arg_dist.planning.rows import Counts
from arg_dist.planning.traffic import Moved
from arg_dist.planning.units import MatrixUnit, TensorUnit, Unit
from arg_dist.sharding.overlap import turns
from arg_dist.subspace.norms import RUN


def temporaries(
    lanes: Sequence[Sequence[Unit]],
    ranks: Mapping[str, int],
    size: int,
    processes: int,
    *,
    is_first: bool,
) -> Counts:
    """Peak temporary bytes of one call to ``step()`` on each process.

    Args:
        lanes: the matrices and tensors of the call, grouped by lane.
        ranks: rank of each matrix, by name.
        size: bytes per element of the weights and gradients that the optimizer receives.
        processes: number of processes.
        is_first: whether this is the first step, which refreshes all matrices; else none is.
    """
    always, squaring = np.zeros(processes, np.int64), np.zeros(processes, np.int64)
    peaks = [_Lane(processes) for _ in lanes]
    for peak, units in zip(peaks, lanes, strict=True):
        for unit in units:
            if isinstance(unit, TensorUnit):
                memory = tensor_memory(unit.planned, unit.settings, size)
                peak.add(unit, memory, unit.rounds)
                held = unit.planned.held
            elif isinstance(unit, MatrixUnit):
                rank, planned = ranks[unit.name], unit.planned
                recorded = matrix_memory(planned, unit.settings, rank, size)
                memory = recorded.with_home(unit.home, is_first=is_first)
                peak.add(unit, memory, unit.rounds(rank, is_first=is_first))
                # squared norms of the gradient's rows
                always[unit.owners] += FP32 * planned.touched
                held = planned.held
            np.maximum.at(squaring, unit.owners, FP32 * np.minimum(held, RUN))
    total: Counts = always + np.maximum(squaring, _most(peaks, processes))
    return total


class _Lane:
    """Temporaries of a lane's matrices and tensors in each of its turns.

    Attributes:
        rounds: the largest number of requests of any of them.
    """

    def __init__(self, processes: int) -> None:
        self.rounds = 0
        self._nothing = np.zeros(processes, np.int64)
        self._alone, self._passing = self._nothing.copy(), self._nothing.copy()
        self._held: list[Counts] = []
        self._messages: list[Counts] = []
        self._answers: list[Counts] = []
        self._ending: list[Counts] = []

    def add(self, unit: Unit, memory: Memory, rounds: Sequence[Moved]) -> None:
        """Add a matrix or tensor."""
        if not unit.is_shared:
            np.maximum.at(self._alone, unit.owners, memory.held[-1] + memory.passing[-1])
            return
        self.rounds = max(self.rounds, len(rounds))
        while len(self._ending) <= len(rounds):
            for each in (self._held, self._messages, self._answers, self._ending):
                each.append(self._nothing.copy())
        for k, (held, moved) in enumerate(zip(memory.held[:-1], rounds, strict=True)):
            self._held[k][unit.owners] += held
            self._messages[k][unit.owners] += moved.sent + moved.received
            self._answers[k][unit.owners] += moved.answer
        np.maximum.at(self._passing, unit.owners, memory.passing.max(0))
        self._ending[len(rounds)][unit.owners] += memory.held[-1]

    def waiting(self, turn: int) -> Counts:
        """Bytes held, messages included, while the collectives of a turn are in flight."""
        return _at(self._held, turn, self._nothing) + _at(self._messages, turn, self._nothing)

    def most(self, turn: int) -> Counts:
        """Peak bytes in a turn."""
        after = self.waiting(turn) + _at(self._ending, turn, self._nothing) + self._passing
        before = self.waiting(0) + self._alone
        if turn:
            held = _at(self._held, turn - 1, self._nothing)
            held = held + _at(self._answers, turn - 1, self._nothing)
            # messages are freed when they are unpacked, before the computations go on
            messages = _at(self._messages, turn - 1, self._nothing)
            before = held + np.maximum(messages, self._passing)
        most: Counts = np.maximum(after, before)
        return most


def _at(numbers: Sequence[Counts], turn: int, nothing: Counts) -> Counts:
    return numbers[turn] if turn < len(numbers) else nothing


def _most(lanes: Sequence[_Lane], processes: int) -> Counts:
    """Peak bytes of all lanes together, as they alternate."""
    most = np.zeros(processes, np.int64)
    waiting: dict[int, Counts] = {}
    for number, turn in turns([lane.rounds for lane in lanes]):
        waiting.pop(number, None)
        others = sum(waiting.values(), np.zeros(processes, np.int64))
        most = np.maximum(most, others + lanes[number].most(turn))
        if turn < lanes[number].rounds:
            waiting[number] = lanes[number].waiting(turn)
    return most
