"""Peak temporary memory of one AdaRankGrad step, modelled on its implementation.

Matrices that one process holds whole are processed one at a time. The shared matrices of a lane go
through the rounds together, so their temporaries add up, and two lanes are in flight at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from arg_dist.algorithm import POLAR_TYPES
from arg_dist.planning.requests import FP32, FP64, Moved, Rounds
from arg_dist.planning.rows import Counts
from arg_dist.planning.units import MatrixUnit, TensorUnit, Unit
from arg_dist.sharding.lanes import turns
from arg_dist.subspace.norms import RUN
from arg_dist.subspace.residual import SCALES_ROWS


class Moment(NamedTuple):
    """Temporaries of a matrix on each owner at one point, and the transient excess before it."""

    held: Counts
    passing: Counts | int = 0


Moments = Sequence[Moment]
"""The points at which a matrix issues its requests, in order, and the end of its computation."""


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
            np.maximum.at(squaring, unit.owners, FP32 * np.minimum(unit.held, RUN))
            if isinstance(unit, TensorUnit):
                peak.add(unit, _adam(unit, size), unit.rounds)
            elif isinstance(unit, MatrixUnit):
                rank = ranks[unit.name]
                if is_first:
                    peak.add(unit, _first(unit, rank, size), unit.first_rounds(rank))
                else:
                    peak.add(unit, _steady(unit, rank, size), unit.steady_rounds(rank))
                # squared norms of the gradient's rows
                always[unit.owners] += FP32 * unit.sides.moment_touch.counts()
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
        self._waiting: list[Counts] = []
        self._answers: list[Counts] = []
        self._ending: list[Counts] = []

    def add(self, unit: Unit, moments: Moments, rounds: Rounds) -> None:
        """Add a matrix or tensor."""
        *through, (end, _) = _merged(moments, rounds)
        if not unit.is_shared:
            np.maximum.at(self._alone, unit.owners, end.held + end.passing)
            return
        self.rounds = max(self.rounds, len(through))
        while len(self._ending) <= len(through):
            for each in (self._waiting, self._answers, self._ending):
                each.append(self._nothing.copy())
        for k, (moment, moved) in enumerate(through):
            assert moved is not None
            np.maximum.at(self._passing, unit.owners, moment.passing)
            self._waiting[k][unit.owners] += moment.held + moved.sent + moved.received
            self._answers[k][unit.owners] += moved.answer
        np.maximum.at(self._passing, unit.owners, end.passing)
        self._ending[len(through)][unit.owners] += end.held

    def waiting(self, turn: int) -> Counts:
        """Bytes held, messages included, while the collectives of a turn are in flight."""
        return _at(self._waiting, turn, self._nothing)

    def most(self, turn: int) -> Counts:
        """Peak bytes in a turn."""
        after = self.waiting(turn) + _at(self._ending, turn, self._nothing) + self._passing
        before = self.waiting(0) + self._alone
        if turn:
            answers = _at(self._answers, turn - 1, self._nothing)
            before = self.waiting(turn - 1) + answers + self._passing
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


def _merged(moments: Moments, rounds: Rounds) -> list[tuple[Moment, Moved | None]]:
    """The points at which something is sent, and the end; the others are folded into the next."""
    found: list[tuple[Moment, Moved | None]] = []
    passed: Counts | int = 0
    for moment, moved in zip_longest(moments, rounds):
        most = np.maximum(moment.held + moment.passing, passed)
        if moved is None and moment is not moments[-1]:
            passed = most
            continue
        found.append((Moment(moment.held, most - moment.held), moved))
        passed = 0
    return found


def _adam(unit: TensorUnit, size: int) -> Moments:
    direction = FP32 * unit.kept
    copies = FP32 * unit.held if size < FP32 else 0  # fp32 copy of gradient, then of weights
    end = FP32 * unit.held if unit.is_shared else direction
    return [Moment(direction, copies), Moment(end, copies)]


def _steady(unit: MatrixUnit, rank: int, size: int) -> Moments:
    rounds = unit.steady_rounds(rank)
    basis = FP32 * rank * unit.sides.basis_touch.counts()
    in_hand = 0 * basis if rounds[0] is None else basis  # None: the basis in the state is used
    return [Moment(0 * basis), *_projection(unit, rank, size, in_hand, rounds)]


def _first(unit: MatrixUnit, rank: int, size: int) -> Moments:
    sides, column = unit.sides, FP32 * unit.width
    touch, keep = column * sides.moment_touch.counts(), column * sides.moment_keep.counts()
    reach, home = column * sides.basis_touch.counts(), column * unit.home_rows()
    copy = _copy(unit, size)
    relay = sides.relay(unit.home, sides.spread.basis.size).counts()
    share = column * relay * sides.spread.is_relayed  # zero where rows are sent directly
    omega, sorting = touch, 3 * home  # QR: a copy and Q
    moments = [Moment(omega + reach, copy), Moment(omega + share)]
    for _ in range(unit.settings.power_passes):
        apart = omega + home + np.maximum(reach, home)  # the sketch and its Q factor
        moments += [
            Moment(omega + 2 * home, sorting),
            Moment(omega + 2 * home + share),
            Moment(apart + touch, copy),
            Moment(apart + keep),
            Moment(apart + touch + reach, copy),
            Moment(apart + touch + share),
        ]
    ordering = omega + np.maximum(reach, home) + 2 * keep  # the image in fp64
    gram = FP64 * unit.width**2 * (home > 0)
    part = FP64 * unit.width * sides.relay(unit.home, unit.width).counts()
    moments += [
        Moment(omega + home, sorting),
        Moment(omega + home + share),
        Moment(omega + np.maximum(reach, home) + touch, copy),
        Moment(ordering, keep + FP64 * unit.width**2),
        Moment(ordering + part * sides.spread.is_relayed),
        Moment(ordering, 5 * home + 3 * gram),  # directions sorted by energy in fp64
        Moment(omega + home),
        Moment(omega + home + share),
    ]
    # with a single owner, the basis is a view of all directions found
    basis = FP32 * rank * sides.basis_touch.counts() if unit.is_shared else home
    return [*moments, *_projection(unit, rank, size, basis, unit.first_rounds(rank))]


def _projection(
    unit: MatrixUnit, rank: int, size: int, basis: Counts, rounds: Rounds
) -> Iterator[Moment]:
    """The points from the basis to the update."""
    row, sides = FP32 * rank, unit.sides
    direction = row * sides.moment_keep.counts()
    product = basis + row * sides.moment_touch.counts()
    yield Moment(product, _copy(unit, size))
    if unit.settings.residual == "orthogonalized":
        yield from _outside(unit, rank, size, basis, rounds)
        return
    limited = unit.settings.residual == "scaled"
    is_summed, is_gathered = rounds[-3 if limited else -2] is not None, rounds[-1] is not None
    held = product + direction * (2 if is_summed else 1)
    for _ in range(1 + limited):
        yield Moment(held)
    gathered = row * sides.moment_update.counts()
    yield Moment(basis + (gathered if is_gathered else direction), _update(unit, size))


def _outside(
    unit: MatrixUnit, rank: int, size: int, basis: Counts, rounds: Rounds
) -> Iterator[Moment]:
    """The points from P to the update, with an orthogonalized residual."""
    sides, row = unit.sides, FP32 * rank
    element = POLAR_TYPES[unit.settings.polar_precision].itemsize
    is_summed, is_spread, _, is_returned = (moved is not None for moved in rounds[-4:])
    direction = row * sides.moment_keep.counts()
    touched = row * sides.moment_touch.counts()
    held = basis + touched + direction * (2 if is_summed else 1)
    yield Moment(held)
    part = element * sides.elements_keep.counts()
    reached = touched * is_spread  # P of the rows that this process touches
    yield Moment(held + reached + part, np.maximum(_copy(unit, size), part * (element < FP32)))
    whole = element * sides.at(unit.home, sides.spread.elements.size).counts()
    short = min(sides.spread.moment.size, sides.spread.basis.size)
    # the next X beside the present one, and two square matrices
    yield Moment(held + whole, whole + 2 * element * short**2 * (whole > 0))
    gathered = row * sides.moment_update.counts() if is_returned else direction
    outside = element * sides.elements_update.counts()
    yield Moment(basis + gathered + outside, _update(unit, size))


def _copy(unit: MatrixUnit, size: int) -> Counts:
    """Bytes of the fp32 copy of the gradient's rows: needed for other dtypes and split rows."""
    block = unit.sides.moment_touch.counts() * unit.sides.basis_touch.counts()
    return FP32 * block * np.where(size < FP32, 1, unit.cuts_rows)


def _update(unit: MatrixUnit, size: int) -> Counts:
    """Bytes needed to apply the update where the weights cannot be updated in place."""
    block = FP32 * unit.sides.moment_update.counts() * unit.sides.basis_touch.counts()
    apart = block * np.where(size < FP32, 1, unit.cuts_rows)
    gradient = apart if unit.settings.residual in SCALES_ROWS else 0 * apart
    weights = FP32 * unit.held if size < FP32 else 0 * unit.held
    both: Counts = apart + np.maximum(gradient, weights)
    return both
