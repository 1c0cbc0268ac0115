"""Memory and traffic of every matrix and tensor of a model under an engine.

All numbers are per process, in the order of a unit's owners.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from arg_dist.config import AdaRankGradConfig
from arg_dist.planning.cuts import Layout, Piece
from arg_dist.planning.requests import (
    FP32,
    Request,
    Rounds,
    Sides,
    first,
    rounds_of,
    sketch_width,
    steady,
)
from arg_dist.planning.rows import Counts, Spans
from arg_dist.sharding.lanes import lanes_of
from arg_dist.sharding.layout import (
    MatrixView,
    Ranges,
    basis_spans_columns,
    clip_ranges,
    element_side,
    matrix_spread,
)


@dataclass(frozen=True, eq=False)
class Unit:
    """Common to matrices and tensors.

    Attributes:
        name: its name.
        elements: number of elements.
        owners: the processes that hold a fragment of it.
        held: elements that each owner holds.
    """

    name: str
    elements: int
    owners: Counts
    held: Counts

    @property
    def is_shared(self) -> bool:
        """Whether its step involves several processes."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class TensorUnit(Unit):
    """A tensor that full-rank Adam trains.

    Attributes:
        kept: elements whose moments each owner stores.
        rounds: what its step sends.
    """

    kept: Counts
    rounds: Rounds

    @property
    def is_shared(self) -> bool:
        """Whether its step involves several processes."""
        return any(self.rounds)

    @property
    def moment_bytes(self) -> Counts:
        """Bytes of both moments."""
        return 2 * FP32 * self.kept


@dataclass(frozen=True, eq=False)
class MatrixUnit(Unit):
    """A low-rank matrix.

    Attributes:
        sides: how it is sharded over its owners.
        home: its home process, as an index into the owners.
        cuts_rows: for each owner, whether it holds partial rows.
        settings: the optimizer's settings.
        smallest: smallest rank allowed.
        largest: largest rank allowed.
    """

    sides: Sides
    home: int
    cuts_rows: Counts
    settings: AdaRankGradConfig
    smallest: int
    largest: int

    @property
    def is_shared(self) -> bool:
        """Whether its step involves several processes."""
        return len(self.owners) > 1

    @property
    def width(self) -> int:
        """Number of columns in its sketch."""
        return sketch_width(self.sides.spread, self.settings)

    def basis_bytes(self, rank: int) -> Counts:
        """Bytes of the basis."""
        return FP32 * rank * self.sides.store.counts()

    def moment_bytes(self, rank: int) -> Counts:
        """Bytes of both moments."""
        return 2 * FP32 * rank * self.sides.moment_keep.counts()

    def steady_rounds(self, rank: int) -> Rounds:
        """What a step without a refresh sends, request by request."""
        return _steady(self.sides, self.settings, rank, self.home)

    def first_rounds(self, rank: int) -> Rounds:
        """What the first step sends, request by request."""
        return _first(self.sides, self.settings, rank, self.home)

    def home_rows(self) -> Counts:
        """Number of rows of the basis for the home process, 0 for the other owners."""
        return self.sides.at(self.home, self.sides.spread.basis.size).high


def units_of(layout: Layout, settings: AdaRankGradConfig) -> list[list[Unit]]:
    """The matrices and tensors of each call to ``step()``, in the order of the sharding plan.

    Args:
        layout: the model's layout under the engine.
        settings: the optimizer's settings.
    """
    calls = []
    for call in layout.calls:
        units: list[Unit] = []
        for piece in layout.pieces(call):
            for view in piece.parameter.views:
                units.append(_matrix(piece, view, len(units), layout, settings))
            if not piece.parameter.views:
                units.append(_tensor(piece, layout))
        calls.append(units)
    return calls


def lanes(units: list[Unit], settings: AdaRankGradConfig) -> list[list[Unit]]:
    """Group the matrices and tensors of a call into lanes, whose collectives are batched."""
    cuts = lanes_of([FP32 * unit.elements for unit in units], settings.bucket_size)
    return [[units[i] for i in cut] for cut in cuts]


def matrices(calls: list[list[Unit]]) -> Iterator[MatrixUnit]:
    """All low-rank matrices."""
    return (unit for units in calls for unit in units if isinstance(unit, MatrixUnit))


def tensors(calls: list[list[Unit]]) -> Iterator[TensorUnit]:
    """All tensors that full-rank Adam trains."""
    return (unit for units in calls for unit in units if isinstance(unit, TensorUnit))


def _matrix(
    piece: Piece, view: MatrixView, unit: int, layout: Layout, settings: AdaRankGradConfig
) -> MatrixUnit:
    some, ranges = _owned(piece.ranges, view.offset, view.rows * view.columns)
    sides = _sides(
        view.rows,
        view.columns,
        ranges,
        basis_spans_columns(view.rows, view.columns, settings.side, transposed=False),
        settings.shard_basis is not False,
        layout.replicated,
    )
    ends = np.array(ranges)
    smallest, largest = settings.rank_bounds(view.short)
    return MatrixUnit(
        view.name,
        view.rows * view.columns,
        piece.owners[some],
        ends[:, 1] - ends[:, 0],
        sides,
        unit % len(some),
        (ends % view.columns != 0).any(1),
        settings,
        smallest,
        largest,
    )


def _tensor(piece: Piece, layout: Layout) -> TensorUnit:
    keep, rounds = _elements(piece.ranges, piece.parameter.numel, layout.replicated)
    ends = np.array(piece.ranges)
    name, numel = piece.parameter.name, piece.parameter.numel
    return TensorUnit(name, numel, piece.owners, ends[:, 1] - ends[:, 0], keep.counts(), rounds)


@lru_cache(maxsize=512)
def _owned(ranges: Ranges, offset: int, numel: int) -> tuple[list[int], Ranges]:
    """The owners of a slice of a parameter, and the elements of the slice that each holds."""
    clipped = clip_ranges(ranges, offset, numel)
    some = [i for i, (start, stop) in enumerate(clipped) if start < stop]
    return some, tuple(clipped[i] for i in some)


@lru_cache(maxsize=512)
def _sides(
    rows: int, columns: int, ranges: Ranges, spans_columns: bool, shard_basis: bool, whole: bool
) -> Sides:
    spread = matrix_spread(
        rows,
        columns,
        ranges,
        me=0,
        spans_columns=spans_columns,
        home=0,
        shard_basis=shard_basis,
        replicated=whole,
    )
    return Sides(spread)


@lru_cache(maxsize=512)
def _elements(ranges: Ranges, numel: int, whole: bool) -> tuple[Spans, Rounds]:
    side = element_side(ranges, numel, whole)
    keep, update = Spans.of(side.keep), Spans.of(side.update)
    return keep, rounds_of([Request(keep, update, (FP32,))])


@lru_cache(maxsize=2048)
def _steady(sides: Sides, settings: AdaRankGradConfig, rank: int, home: int) -> Rounds:
    return rounds_of(steady(sides, settings, rank, home))


@lru_cache(maxsize=2048)
def _first(sides: Sides, settings: AdaRankGradConfig, rank: int, home: int) -> Rounds:
    return rounds_of(first(sides, settings, rank, home))
