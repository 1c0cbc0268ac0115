"""From blocks to shardings: matrices of which each process holds some rows and some columns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

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
    transposed: bool = False,
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
        transposed: as of :func:`arg_dist.sharding.layout.shard_matrix`.

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
        outputs_are_moment=spans_columns != transposed,
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


def held_range(view: MatrixView, shape: tuple[int, ...], box: Ranges, block: Block) -> Interval:
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


def _contains(box: Ranges, place: tuple[int, ...]) -> bool:
    return all(low <= index < high for (low, high), index in zip(box, place, strict=False))


def shard_boxes(name: str, shape: tuple[int, ...], boxes: Boxes) -> DimensionSharding:
    """The distribution of a tensor's elements, box after box.

    Args:
        name: its name.
        shape: its full shape.
        boxes: what each process holds of it, in each dimension.

    Raises:
        RuntimeError: the boxes are not those of a grid, or do not cover the tensor.
    """
    held = list(zip(*boxes, strict=True)) if boxes else [()]
    sizes = [math.prod(map(row_count, box)) for box in held]
    distinct = {box: size for box, size in zip(held, sizes, strict=True) if size}
    if sum(distinct.values()) != math.prod(shape) or not all(map(_is_grid, boxes)):
        raise RuntimeError(
            f"{name}: the processes hold the boxes {held} of its shape {shape}, which are not "
            "those of a grid; arg_dist does not support this layout of the engine"
        )
    starts = dict(zip(distinct, accumulate(distinct.values(), initial=0), strict=False))
    updated = [
        (starts.get(box, 0), starts.get(box, 0) + size)
        for box, size in zip(held, sizes, strict=True)
    ]
    parts = _even_parts(tuple(updated))
    return DimensionSharding(math.prod(shape), parts, parts, tuple(updated))


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
    order = tuple(dict.fromkeys(held[i] for i in owners))
    covered = sum((b - a) * (d - c) for (a, b), (c, d) in order)
    worked_on = _even_parts_of_holders(held)
    if covered != rows * columns or not all(map(_is_grid, (moments, bases, worked_on))):
        raise RuntimeError(
            f"the processes hold the blocks {list(blocks)} (rows, columns) of a matrix of {rows} x "
            f"{columns}, which are not those of a grid; arg_dist does not support this layout of "
            "the engine"
        )
    sizes = [(b - a) * (d - c) for (a, b), (c, d) in order]
    starts = dict(zip(order, accumulate(sizes, initial=0), strict=False))
    updated, touched = [], []
    for block, (low, high) in zip(held, worked_on, strict=True):
        (a, b), (c, d) = block
        start, width = starts.get(block, 0), d - c
        updated.append((start, start + (b - a) * width))
        touched.append((start + (low - a) * width, start + (high - a) * width))
    moment_size, basis_size = (rows, columns) if spans_columns else (columns, rows)
    parts = tuple(touched)
    return _Sides(
        DimensionSharding(moment_size, worked_on, _even_parts(worked_on), moments),
        DimensionSharding(basis_size, bases, _even_parts(bases), bases),
        DimensionSharding(rows * columns, parts, parts, tuple(updated)),
        owners,
        order,
    )


def _even_parts_of_holders(held: Sequence[Block]) -> Rows:
    """The rows of each process, of which those that hold the same block have an even part each."""
    holders, before = Counter(held), Counter[Block]()
    parts = []
    for block in held:
        parts.append(even_part(block[0], before[block], holders[block]))
        before[block] += 1
    return tuple(parts)


def _even_parts(rows: Rows) -> Rows:
    """The rows of each process, of which those that have the same have an even part each."""
    return _even_parts_of_holders([(each, (0, 0)) for each in rows])


def _is_grid(rows: Rows) -> bool:
    """Whether any two intervals are equal or have nothing in common."""
    distinct = sorted({each for each in rows if each[0] < each[1]})
    return all(before[1] <= after[0] for before, after in pairwise(distinct))
