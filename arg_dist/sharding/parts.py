"""How one parameter is cut over the processes of a group: in ranges of elements, or in boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from arg_dist.sharding.blocks import (
    Boxes,
    blocks_of_matrix,
    held_range,
    own_boxes,
    shard_blocks,
    shard_boxes,
)
from arg_dist.sharding.fragment import Box, Fragment
from arg_dist.sharding.layout import (
    GroupSpec,
    MatrixView,
    Ranges,
    check_tiling,
    clip_ranges,
    shard_elements,
    shard_matrix,
)
from arg_dist.subspace.distributed import (
    DimensionSharding,
    Interval,
    MatrixSharding,
    even_part,
)


class MatrixPart(NamedTuple):
    """What this process holds of a matrix.

    Attributes:
        sharding: of the matrix.
        offset: the element from which those held are counted.
        held: the elements held.
    """

    sharding: MatrixSharding
    offset: int
    held: Interval


class Parts(Protocol):
    """How the matrices of a parameter, or its elements, are cut, and which of them are here."""

    def matrix(self, view: MatrixView, spans_columns: bool, home: int) -> MatrixPart:
        """The part of a matrix."""

    def tensor(self) -> DimensionSharding:
        """The sharding of the elements, where Adam trains them."""

    @property
    def own(self) -> Box:
        """The elements that this process writes to a checkpoint; every element has one such."""

    @property
    def is_shared(self) -> bool:
        """Whether some processes hold the same box; of ranges the plan itself knows."""


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

    def matrix(self, view: MatrixView, spans_columns: bool, home: int) -> MatrixPart:
        """The part of a matrix; its elements are counted from its first one."""
        ranges = clip_ranges(self.ranges, view.offset, view.rows * view.columns)
        sharding = shard_matrix(
            view.rows,
            view.columns,
            ranges,
            me=self.me,
            spans_columns=spans_columns,
            home=home,
            shard_basis=self.spec.shard_basis,
            replicated=self.spec.holding.replicated,
            transposed=self.fragment.transposed,
            terms=self.spec.terms,
            copy_of=self.copy_of,
        )
        return MatrixPart(sharding, view.offset, ranges[self.me])

    def tensor(self) -> DimensionSharding:
        """The sharding of the elements, where Adam trains them."""
        width = self.fragment.width
        ranges = tuple((start * width, stop * width) for start, stop in self.ranges)
        numel, replicated = math.prod(self.fragment.shape) * width, self.spec.holding.replicated
        return shard_elements(
            ranges, numel, replicated, terms=self.spec.terms, copy_of=self.copy_of
        )

    @property
    def own(self) -> Box:
        """The elements that this process writes: all that it holds, or an even part of them."""
        copies, me = self.copy_of, self.me
        if self.spec.holding.replicated:
            copies = tuple(range(len(self.ranges)))
        if copies is None:
            return self.fragment.held
        return (even_part(self.ranges[me], copies[me], max(copies) + 1),)

    @property
    def is_shared(self) -> bool:
        """No: those that hold the same ranges are other copies of the model."""
        return False


@dataclass(frozen=True)
class Boxed:
    """Of a parameter of which each process holds a box."""

    fragment: Fragment
    boxes: Boxes
    spec: GroupSpec
    me: int

    def matrix(self, view: MatrixView, spans_columns: bool, home: int) -> MatrixPart:
        """The part of a matrix; its elements are counted in the box."""
        blocks = blocks_of_matrix(view, self.fragment.shape, self.boxes)
        sharding = shard_blocks(
            view.rows,
            view.columns,
            blocks,
            me=self.me,
            spans_columns=spans_columns,
            home=home,
            shard_basis=self.spec.shard_basis,
        )
        box = tuple(each[self.me] for each in self.boxes)
        held = held_range(view, self.fragment.shape, box, blocks[self.me])
        return MatrixPart(sharding, 0, held)

    def tensor(self) -> DimensionSharding:
        """The sharding of the elements, where Adam trains them."""
        return shard_boxes(self.fragment.name, self.fragment.shape, self.boxes)

    @property
    def own(self) -> Box:
        """The box that this process writes, and of whose elements it keeps Adam's state."""
        return own_boxes(self.boxes)[self.me]

    @property
    def is_shared(self) -> bool:
        """Whether some processes hold the same box."""
        return own_boxes(self.boxes) != tuple(zip(*self.boxes, strict=True))


def _by_copy(ranges: Ranges, copy_of: tuple[int, ...] | None) -> list[Ranges]:
    """The ranges of the processes of each copy of the model."""
    if copy_of is None:
        return [ranges]
    pairs = list(zip(ranges, copy_of, strict=True))
    return [tuple(one for one, i in pairs if i == copy) for copy in range(max(copy_of) + 1)]
