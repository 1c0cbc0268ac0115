"""How one parameter is cut over the processes of a group: in ranges of elements, or in boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from arg_dist.sharding.blocks import (
    Boxes,
    blocks_of_matrix,
    held_range,
    shard_blocks,
    shard_boxes,
)
from arg_dist.sharding.fragment import Fragment
from arg_dist.sharding.layout import (
    GroupSpec,
    MatrixView,
    Ranges,
    check_tiling,
    clip_ranges,
    shard_elements,
    shard_matrix,
)
from arg_dist.subspace.distributed import DimensionSharding, Interval, MatrixSharding


class Parts(Protocol):
    """How the matrices of a parameter, or its elements, are cut, and which of them are here."""

    def matrix(self, view: MatrixView, spans_columns: bool, home: int) -> MatrixSharding:
        """The sharding of a matrix."""

    def here(self, view: MatrixView) -> Interval:
        """Its elements held by this process, from `offset` or among those of the box."""

    def tensor(self) -> DimensionSharding:
        """The sharding of the elements, where Adam trains them."""

    def offset(self, view: MatrixView) -> int:
        """What :attr:`arg_dist.sharding.shard.Shard.offset` of a matrix is."""


@dataclass(frozen=True)
class Ranged:
    """Of a parameter of which each process holds a range of elements."""

    fragment: Fragment
    ranges: Ranges
    spec: GroupSpec
    me: int
    copy_of: tuple[int, ...] | None

    def __post_init__(self) -> None:
        copies = () if self.spec.holding.replicated else _by_copy(self.ranges, self.copy_of)
        for one_copy in copies:
            check_tiling(self.fragment.name, one_copy, math.prod(self.fragment.shape))

    def matrix(self, view: MatrixView, spans_columns: bool, home: int) -> MatrixSharding:
        """The sharding of a matrix."""
        return shard_matrix(
            view.rows,
            view.columns,
            clip_ranges(self.ranges, view.offset, view.rows * view.columns),
            me=self.me,
            spans_columns=spans_columns,
            home=home,
            shard_basis=self.spec.shard_basis,
            replicated=self.spec.holding.replicated,
            transposed=self.fragment.transposed,
            terms=self.spec.terms,
            copy_of=self.copy_of,
        )

    def here(self, view: MatrixView) -> Interval:
        """Its elements held by this process, from the first of the matrix."""
        return clip_ranges(self.ranges, view.offset, view.rows * view.columns)[self.me]

    def offset(self, view: MatrixView) -> int:
        """The first element of the matrix in the parameter."""
        return view.offset

    def tensor(self) -> DimensionSharding:
        """The sharding of the elements, where Adam trains them."""
        width = self.fragment.width
        ranges = tuple((start * width, stop * width) for start, stop in self.ranges)
        numel, replicated = math.prod(self.fragment.shape) * width, self.spec.holding.replicated
        return shard_elements(
            ranges, numel, replicated, terms=self.spec.terms, copy_of=self.copy_of
        )


@dataclass(frozen=True)
class Boxed:
    """Of a parameter of which each process holds a box."""

    fragment: Fragment
    boxes: Boxes
    spec: GroupSpec
    me: int

    def matrix(self, view: MatrixView, spans_columns: bool, home: int) -> MatrixSharding:
        """The sharding of a matrix."""
        return shard_blocks(
            view.rows,
            view.columns,
            blocks_of_matrix(view, self.fragment.shape, self.boxes),
            me=self.me,
            spans_columns=spans_columns,
            home=home,
            shard_basis=self.spec.shard_basis,
        )

    def here(self, view: MatrixView) -> Interval:
        """Its elements held by this process, among those of the box."""
        block = blocks_of_matrix(view, self.fragment.shape, self.boxes)[self.me]
        box = tuple(each[self.me] for each in self.boxes)
        return held_range(view, self.fragment.shape, box, block)

    def offset(self, view: MatrixView) -> int:
        """0: what is held is counted in the box."""
        return 0

    def tensor(self) -> DimensionSharding:
        """The sharding of the elements, where Adam trains them."""
        return shard_boxes(self.fragment.name, self.fragment.shape, self.boxes)


def _by_copy(ranges: Ranges, copy_of: tuple[int, ...] | None) -> list[Ranges]:
    """The ranges of the processes of each copy of the model."""
    if copy_of is None:
        return [ranges]
    pairs = list(zip(ranges, copy_of, strict=True))
    return [tuple(one for one, i in pairs if i == copy) for copy in range(max(copy_of) + 1)]
