"""How a matrix or tensor is sharded over its owners, the processes that hold a part of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from arg_dist.planning.rows import Counts, Spans, box_counts
from arg_dist.sharding.blocks import Blocks, Boxes, shard_blocks, shard_boxes
from arg_dist.sharding.fragment import Fragment
from arg_dist.sharding.layout import (
    MatrixView,
    Ranges,
    shard_elements,
    shard_matrix,
)
from arg_dist.sharding.shard import MatrixShard, TensorShard, local_part
from arg_dist.subspace.distributed import DimensionSharding, MatrixSharding


@dataclass(frozen=True, eq=False)
class PlannedMatrix:
    """How one matrix is sharded; equal ones are one object.

    Attributes:
        rows: its first dimension.
        columns: its second dimension.
        ranges: elements that each owner holds.
        spans_columns: whether the basis spans the columns.
        shard_basis: store the basis once over the owners.
        replicated: every process holds the whole matrix.
        terms: every process has a gradient of its own, or every copy of the model.
        copy_of: in which copy each owner holds its range; None if there is one.
        by_all: every process of the group is an owner.
        blocks: under tensor parallelism, instead of ranges, rows and columns of each owner.
    """

    rows: int
    columns: int
    ranges: Ranges
    spans_columns: bool
    shard_basis: bool
    replicated: bool
    terms: bool = False
    copy_of: tuple[int, ...] | None = None
    by_all: bool = True
    blocks: Blocks = ()

    @cached_property
    def owners(self) -> int:
        """Number of owners."""
        return len(self.blocks or self.ranges)

    @cached_property
    def sharding(self) -> MatrixSharding:
        """The distribution over the owners, for the first, which is the home process."""
        return self._sharding(me=0, home=0)

    def _sharding(self, me: int, home: int) -> MatrixSharding:
        if self.blocks:
            return shard_blocks(
                self.rows,
                self.columns,
                self.blocks,
                me=me,
                spans_columns=self.spans_columns,
                home=home,
                shard_basis=self.shard_basis,
            )
        return shard_matrix(
            self.rows,
            self.columns,
            self.ranges,
            me=me,
            spans_columns=self.spans_columns,
            home=home,
            shard_basis=self.shard_basis,
            replicated=self.replicated,
            terms=self.terms,
            copy_of=self.copy_of,
        )

    @cached_property
    def held(self) -> Counts:
        """Elements that each owner holds."""
        held: Counts = self.ends[:, 1] - self.ends[:, 0]
        return held

    @cached_property
    def ends(self) -> Counts:
        """``owners x 2``: the range that each owner holds of the elements, or of its block."""
        if not self.blocks:
            return np.array(self.ranges, np.int64)
        sizes = box_counts(tuple(zip(*self.blocks, strict=True)))
        return np.stack([np.zeros_like(sizes), sizes], 1)

    @cached_property
    def splits_rows(self) -> Counts:
        """``owners x 2``: whether a row is cut where what an owner holds begins, and ends."""
        if self.blocks:
            return np.zeros_like(self.ends)
        found: Counts = self.ends % self.columns != 0
        return found

    @cached_property
    def stored(self) -> Counts:
        """Rows of the basis that each owner stores."""
        return Spans.of(self.sharding.store).counts()

    @cached_property
    def kept(self) -> Counts:
        """Rows of the moments that each owner keeps."""
        return Spans.of(self.sharding.moment.keep).counts()

    @cached_property
    def touched(self) -> Counts:
        """Rows of the moment side that each owner touches."""
        return Spans.of(self.sharding.moment.touch).counts()

    def shard(self, me: int, *, is_home: bool, dtype: torch.dtype) -> MatrixShard:
        """The part of owner `me`, on the meta device, with a gradient."""
        home = me if is_home else (me + 1) % self.owners
        start, stop = self.ends[me].tolist()
        return MatrixShard(
            unit=0,
            name="a matrix",
            fragment=_fragment((self.rows, self.columns), (start, stop), dtype),
            offset=0,
            range=(start, stop),
            group=0,
            me=me,
            matrix=MatrixView("a matrix", self.rows, self.columns, 0),
            sharding=self._sharding(me, home),
            spans_columns=self.spans_columns,
            replicated=self.replicated,
            phase=0.0,
        )


@dataclass(frozen=True, eq=False)
class PlannedTensor:
    """How the elements of one tensor are sharded; equal ones are one object.

    Attributes:
        size: number of its elements.
        ranges: elements that each owner holds.
        replicated: every process holds the whole tensor.
        terms: every process has a gradient of its own, or every copy of the model.
        copy_of: in which copy each owner holds its range; None if there is one.
        by_all: every process of the group is an owner.
        boxes: under tensor parallelism, instead of ranges, what each owner holds of each dimension.
        shape: then the shape of the tensor.
    """

    size: int
    ranges: Ranges
    replicated: bool
    terms: bool = False
    copy_of: tuple[int, ...] | None = None
    by_all: bool = True
    boxes: Boxes = ()
    shape: tuple[int, ...] = ()

    @cached_property
    def sharding(self) -> DimensionSharding:
        """The distribution over the owners."""
        if self.boxes:
            return shard_boxes("a tensor", self.shape, self.boxes)
        return shard_elements(
            self.ranges, self.size, self.replicated, terms=self.terms, copy_of=self.copy_of
        )

    @cached_property
    def held(self) -> Counts:
        """Elements that each owner holds."""
        return box_counts(self.boxes) if self.boxes else Spans.of(self.ranges).counts()

    @cached_property
    def kept(self) -> Counts:
        """Elements whose moments each owner keeps."""
        return Spans.of(self.sharding.keep).counts()

    def shard(self, me: int, dtype: torch.dtype) -> TensorShard:
        """The part of owner `me`, on the meta device, with a gradient."""
        held = (0, int(self.held[me])) if self.boxes else self.ranges[me]
        return TensorShard(
            unit=0,
            name="a tensor",
            fragment=_fragment((self.size,), held, dtype),
            offset=0,
            range=held,
            group=0,
            me=me,
            sharding=self.sharding,
        )


def _fragment(shape: tuple[int, ...], held: tuple[int, int], dtype: torch.dtype) -> Fragment:
    target = torch.empty(held[1] - held[0], dtype=dtype, device="meta")
    target.grad = torch.empty_like(target)
    return Fragment("a parameter", shape, *held, target, local_part)
