"""From blocks to shardings: matrices of which each process holds some rows and some columns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from arg_dist.sharding.fragment import Box
from arg_dist.sharding.layout import MatrixView, Ranges
from arg_dist.subspace.distributed import (
    Block,
    DimensionSharding,
    Interval,
    MatrixSharding,
    Rows,
    even_part,
    row_count,
)

Blocks = tuple[Block, ...]
"""Rows and columns of one matrix that each process of a group holds."""
Boxes = tuple[Ranges, ...]
"""Of each dimension of a parameter, the interval that each process holds."""


def shard_blocks(
    rows: int,
    columns: int,
    blocks: Blocks,
    *,
    me: int,
    spans_columns: bool,
    home: int,
    shard_basis: bool,
) -> MatrixSharding:
    """The sharding of a ``rows x columns`` matrix of which each process holds a rectangle.

    The blocks are those of a grid: any two have the same rows or none in common, and so with
    columns. Processes that hold the same block have equal gradients of it; each of them works on an
    even part of its rows. Those that work on the same rows, or columns, keep an even part each.

    Args:
        rows: first dimension.
        columns: second dimension.
        blocks: rows and columns that each process holds; empty ones are left out.
        me: this process's index.
        spans_columns: whether the basis spans the columns.
        home: selects the home process: owner number `home` modulo the number of owners.
        shard_basis: store the basis once over the owners, instead of whole on each.

    Raises:
        RuntimeError: the blocks are not those of a grid, or do not cover the matrix.
    """
    sides = _sides_of_blocks(rows, columns, blocks, spans_columns)
    basis = sides.basis
    return MatrixSharding(
        moment=sides.moment,
        basis=basis,
        elements=sides.elements,
        cuts_moment=True,
        outputs_are_moment=spans_columns,
        store=basis.keep if shard_basis else basis.touch,
        owners=sides.owners,
        home=sides.owners[home % len(sides.owners)],
        me=me,
        blocks=sides.blocks,
    )


def blocks_of_matrix(view: MatrixView, shape: tuple[int, ...], boxes: Boxes) -> Blocks:
    """Rows and columns of one matrix that each process holds.

    Args:
        view: the matrix.
        shape: full shape of its parameter.
        boxes: what each process holds of the parameter, in each dimension.

    Raises:
        RuntimeError: dimensions that are the columns of the matrix are cut.
    """
    if view.columns == shape[-1]:
        place = _place(view, shape)
        nothing = ((0, 0), (0, 0))
        return tuple(
            (box[-2], box[-1]) if _contains(box, place) else nothing
            for box in zip(*boxes, strict=True)
        )
    for size, cut in zip(shape[1:], boxes[1:], strict=True):
        if any(each != (0, size) and each[0] < each[1] for each in cut):
            raise RuntimeError(
                f"{view.name}: it trains as a matrix of {view.rows} x {view.columns}, and the "
                f"engine cuts a dimension of its shape {shape} within a row; shard its first "
                'dimension, or exclude it (exclude=["..."]) so that Adam trains it'
            )
    whole = (0, view.columns)
    return tuple(
        (box[0], whole if all(low < high for low, high in box) else (0, 0))
        for box in zip(*boxes, strict=True)
    )


def held_range(view: MatrixView, shape: tuple[int, ...], box: Box, block: Block) -> Interval:
    """Where the block of a matrix lies among the elements of a box of its parameter."""
    numel = row_count(block[0]) * row_count(block[1])
    before = 0
    if view.columns == shape[-1]:
        for position, (low, high) in zip(_place(view, shape), box, strict=False):
            before = before * (high - low) + position - low
    return before * numel, (before + 1) * numel if numel else before * numel


def _place(view: MatrixView, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The indices of a matrix in the leading dimensions of its parameter."""
    number, place = view.offset // (view.rows * view.columns), []
    for size in reversed(shape[:-2]):
        number, index = divmod(number, size)
        place.append(index)
    return tuple(reversed(place))


def _contains(box: Box, place: tuple[int, ...]) -> bool:
    return all(low <= index < high for (low, high), index in zip(box, place, strict=False))


def shard_boxes(name: str, shape: tuple[int, ...], boxes: Boxes) -> DimensionSharding:
    """The distribution of a tensor's elements, box after box; each keeps its :func:`own_boxes`.

    Args:
        name: its name.
        shape: its full shape.
        boxes: what each process holds of it, in each dimension.

    Raises:
        RuntimeError: the boxes are not those of a grid, or do not cover the tensor.
    """
    held = list(zip(*boxes, strict=True))
    distinct, updated = _in_turn(held)
    covered = sum(map(_size, distinct))
    if covered != math.prod(shape) or not all(map(_is_grid, boxes)):
        raise RuntimeError(
            f"{name}: the processes hold the boxes {held} of its shape {shape}, which are not "
            "those of a grid; arg_dist does not support this layout of the engine"
        )
    parts = []
    for (start, _), box, own in zip(updated, held, own_boxes(boxes), strict=True):
        first = start + _first_element(own, box)
        parts.append((first, first + _size(own)))
    return DimensionSharding(math.prod(shape), tuple(parts), tuple(parts), updated)


@lru_cache(maxsize=4096)
def own_boxes(boxes: Boxes) -> tuple[Box, ...]:
    """The part of its box for which each process answers alone, where several hold the same.

    Each has an even part of the first dimension that has several indices: a box, whose elements are
    in one piece.

    Args:
        boxes: what each process holds, in each dimension.
    """
    held: list[Box] = list(zip(*boxes, strict=True))
    cut = [_first_with_several(box) for box in held]
    parts = _even_parts([box[k] for box, k in zip(held, cut, strict=True)], held)
    return tuple(
        (*box[:k], part, *box[k + 1 :]) for box, k, part in zip(held, cut, parts, strict=True)
    )


def _first_with_several(box: Box) -> int:
    """The first dimension in which a box has more than one index; 0 if there is none."""
    return next((k for k, each in enumerate(box) if row_count(each) > 1), 0)


def _first_element(part: Box, box: Box) -> int:
    """Position of the first element of a part of a box among its elements."""
    position = 0
    for (low, _), bounds in zip(part, box, strict=True):
        position = position * row_count(bounds) + low - bounds[0]
    return position


class _Sides(NamedTuple):
    """What :func:`shard_blocks` finds for all processes.

    Attributes:
        moment: the moment side.
        basis: the basis side.
        elements: the elements, block after block.
        owners: processes that hold a block.
        blocks: the distinct ones, ``moment x basis``.
    """

    moment: DimensionSharding
    basis: DimensionSharding
    elements: DimensionSharding
    owners: tuple[int, ...]
    blocks: tuple[Block, ...]


@lru_cache(maxsize=4096)
def _sides_of_blocks(rows: int, columns: int, blocks: Blocks, spans_columns: bool) -> _Sides:
    """The sides of a ``rows x columns`` matrix; equal matrices share them."""
    held = [block if spans_columns else block[::-1] for block in blocks]
    held = [block if all(a < b for a, b in block) else ((0, 0), (0, 0)) for block in held]
    owners = tuple(i for i, block in enumerate(held) if block[0][0] < block[0][1])
    moments, bases = zip(*held, strict=True)
    order, updated = _in_turn(held)
    covered = sum(map(_size, order))
    worked_on = _even_parts(moments, held)
    if covered != rows * columns or not all(map(_is_grid, (moments, bases, worked_on))):
        raise RuntimeError(
            f"the processes hold the blocks {list(blocks)} (rows, columns) of a matrix of {rows} x "
            f"{columns}, which are not those of a grid; arg_dist does not support this layout of "
            "the engine"
        )
    touched = []
    for (start, _), (rows_held, (c, d)), (low, high) in zip(updated, held, worked_on, strict=True):
        first = start - rows_held[0] * (d - c)
        touched.append((first + low * (d - c), first + high * (d - c)))
    moment_size, basis_size = (rows, columns) if spans_columns else (columns, rows)
    parts = tuple(touched)
    return _Sides(
        DimensionSharding(moment_size, worked_on, _even_parts(worked_on, worked_on), moments),
        DimensionSharding(basis_size, bases, _even_parts(bases, bases), bases),
        DimensionSharding(rows * columns, parts, parts, updated),
        owners,
        order,
    )


def _in_turn(held: Sequence[Ranges]) -> tuple[tuple[Any, ...], Rows]:
    """The distinct boxes that are not empty, and the elements that each process holds, in turn."""
    distinct = tuple(dict.fromkeys(box for box in held if _size(box)))
    starts = dict(zip(distinct, accumulate(map(_size, distinct), initial=0), strict=False))
    first = [starts.get(box, 0) for box in held]
    return distinct, tuple((at, at + _size(box)) for at, box in zip(first, held, strict=True))


def _size(box: Box) -> int:
    """Number of elements."""
    return math.prod(map(row_count, box))


def _even_parts(rows: Sequence[Interval], held: Sequence[Hashable]) -> Rows:
    """The rows of each process, of which those that hold the same have an even part each."""
    holders, before = Counter(held), Counter[Hashable]()
    parts = []
    for each, what in zip(rows, held, strict=True):
        parts.append(even_part(each, before[what], holders[what]))
        before[what] += 1
    return tuple(parts)


def _is_grid(rows: Rows) -> bool:
    """Whether any two intervals are equal or have nothing in common."""
    distinct = sorted({each for each in rows if each[0] < each[1]})
    return all(before[1] <= after[0] for before, after in pairwise(distinct))
