"""Memory and traffic of every matrix and tensor of a model under an engine.

All numbers are per process, in the order of a unit's owners.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import numpy as np

from arg_dist.config import AdaRankGradConfig
from arg_dist.planning.cuts import Layout, Piece
from arg_dist.planning.rows import Counts, box_counts
from arg_dist.planning.shardings import PlannedMatrix, PlannedTensor
from arg_dist.planning.traffic import Moved, matrix_traffic, tensor_traffic
from arg_dist.sharding.blocks import Blocks, Boxes, blocks_of_matrix
from arg_dist.sharding.layout import MatrixView, Ranges, basis_spans_columns, clip_ranges
from arg_dist.sharding.overlap import Load, lanes_of, load_of
from arg_dist.subspace.compact import row_bytes, tensor_bytes


@dataclass(frozen=True, eq=False)
class Unit:
    """Common to matrices and tensors.

    Attributes:
        name: its name.
        elements: number of elements.
        owners: the processes that hold a fragment of it.
        settings: the optimizer's settings.
    """

    name: str
    elements: int
    owners: Counts
    settings: AdaRankGradConfig

    @property
    def is_shared(self) -> bool:
        """Whether its step involves several processes."""
        raise NotImplementedError

    @property
    def load(self) -> Load:
        """What it has in the messages of a round."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class TensorUnit(Unit):
    """A tensor that full-rank Adam trains.

    Attributes:
        planned: how it is sharded over its owners.
    """

    planned: PlannedTensor

    @property
    def is_shared(self) -> bool:
        """Whether its step involves several processes."""
        return bool(self.rounds)

    @property
    def rounds(self) -> list[Moved]:
        """What each round of a step moves."""
        return tensor_traffic(self.planned, self.settings)

    @property
    def load(self) -> Load:
        """What it has in the messages of a round."""
        return load_of(self.planned.sharding)

    @property
    def moment_bytes(self) -> Counts:
        """Bytes of both moments."""
        kept, precision = self.planned.kept, self.settings.full_rank_state
        return np.array([2 * tensor_bytes(int(each), precision) for each in kept], np.int64)


@dataclass(frozen=True, eq=False)
class MatrixUnit(Unit):
    """A low-rank matrix.

    Attributes:
        planned: how it is sharded over its owners.
        home: its home process, as an index into the owners.
        largest: largest rank allowed.
    """

    planned: PlannedMatrix
    home: int
    largest: int

    @property
    def is_shared(self) -> bool:
        """Whether its step involves several processes."""
        return len(self.owners) > 1

    @property
    def load(self) -> Load:
        """What it has in the messages of a round."""
        goes_home = self.settings.goes_home
        load = load_of(self.planned.sharding, self.largest, goes_home=goes_home)
        return load._replace(home=int(self.owners[self.home]))

    def basis_bytes(self, rank: int) -> Counts:
        """Bytes of the basis."""
        return row_bytes(rank, self.settings.state_dtype) * self.planned.stored

    def moment_bytes(self, rank: int) -> Counts:
        """Bytes of both moments."""
        return 2 * row_bytes(rank, self.settings.state_dtype) * self.planned.kept

    def rounds(self, rank: int, *, is_first: bool) -> list[Moved]:
        """What each round moves, in the first step or in one without a refresh."""
        return matrix_traffic(self.planned, self.settings, rank, self.home, is_first=is_first)


def units_of(layout: Layout, settings: AdaRankGradConfig) -> list[list[Unit]]:
    """The matrices and tensors of each call to ``step()``, in the order of the sharding plan.

    Args:
        layout: the model's layout under the engine.
        settings: the optimizer's settings.
    """
    calls, positions = [], count()
    for call in layout.calls:
        units: list[Unit] = []
        for piece in layout.pieces(call):
            for home, view in enumerate(piece.parameter.views, start=next(positions)):
                units.append(_matrix(piece, view, home, layout, settings))
            if not piece.parameter.views:
                units.append(_tensor(piece, layout, settings))
        calls.append(units)
    return calls


def lanes(units: list[Unit], settings: AdaRankGradConfig) -> list[list[Unit]]:
    """Group the matrices and tensors of a call into lanes, whose collectives are batched."""
    cuts = lanes_of([unit.load for unit in units], settings.bucket_size)
    return [[units[i] for i in cut] for cut in cuts]


def matrices(calls: list[list[Unit]]) -> Iterator[MatrixUnit]:
    """All low-rank matrices."""
    return (unit for units in calls for unit in units if isinstance(unit, MatrixUnit))


def tensors(calls: list[list[Unit]]) -> Iterator[TensorUnit]:
    """All tensors that full-rank Adam trains."""
    return (unit for units in calls for unit in units if isinstance(unit, TensorUnit))


def _matrix(
    piece: Piece, view: MatrixView, home: int, layout: Layout, settings: AdaRankGradConfig
) -> MatrixUnit:
    terms, blocks = layout.has_terms(settings), Blocks()
    if piece.boxes:
        some, blocks = _owned_blocks(view, piece.parameter.shape, piece.boxes)
        ranges = Ranges()
    else:
        some, ranges = _owned(piece.ranges, view.offset, view.rows * view.columns)
    planned = _planned_matrix(
        view.rows,
        view.columns,
        ranges,
        basis_spans_columns(view.rows, view.columns, settings.side, transposed=False),
        settings.shards_basis(terms=terms),
        layout.replicated,
        terms,
        layout.copy_of(piece.owners[some]),
        len(some) == layout.processes,
        blocks,
    )
    _, largest = settings.rank_bounds(view.short)
    elements, owners = view.rows * view.columns, piece.owners[some]
    return MatrixUnit(view.name, elements, owners, settings, planned, home % len(some), largest)


def _tensor(piece: Piece, layout: Layout, settings: AdaRankGradConfig) -> TensorUnit:
    name, numel = piece.parameter.name, piece.parameter.numel
    owners, boxes = piece.owners, Boxes()
    shape: tuple[int, ...] = ()
    if piece.boxes:
        some, boxes = _owned_boxes(piece.boxes)
        owners, shape = owners[some], piece.parameter.shape
    terms, copy_of = layout.has_terms(settings), layout.copy_of(owners)
    by_all = len(owners) == layout.processes
    planned = _planned_tensor(
        numel, piece.ranges, layout.replicated, terms, copy_of, by_all, boxes, shape
    )
    return TensorUnit(name, numel, owners, settings, planned)


@lru_cache(maxsize=512)
def _owned(ranges: Ranges, offset: int, numel: int) -> tuple[list[int], Ranges]:
    """The owners of a slice of a parameter, and the elements of the slice that each holds."""
    clipped = clip_ranges(ranges, offset, numel)
    some = [i for i, (start, stop) in enumerate(clipped) if start < stop]
    return some, tuple(clipped[i] for i in some)


@lru_cache(maxsize=512)
def _owned_blocks(
    view: MatrixView, shape: tuple[int, ...], boxes: Boxes
) -> tuple[list[int], Blocks]:
    """The owners of a matrix, and the block that each holds."""
    blocks = blocks_of_matrix(view, shape, boxes)
    some = [i for i, block in enumerate(blocks) if all(low < high for low, high in block)]
    return some, tuple(blocks[i] for i in some)


@lru_cache(maxsize=512)
def _owned_boxes(boxes: Boxes) -> tuple[list[int], Boxes]:
    """The owners of a parameter, and the boxes that they hold."""
    some = np.flatnonzero(box_counts(boxes)).tolist()
    return some, tuple(tuple(rows[i] for i in some) for rows in boxes)


_planned_matrix = lru_cache(maxsize=512)(PlannedMatrix)
_planned_tensor = lru_cache(maxsize=512)(PlannedTensor)
