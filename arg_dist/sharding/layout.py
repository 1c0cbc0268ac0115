"""From element ranges to shardings: the rows of each matrix that a process touches and keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from arg_dist.sharding.fragment import Holding
from arg_dist.subspace.distributed import (
    DimensionSharding,
    Interval,
    MatrixSharding,
    Rows,
    Terms,
    even_part,
    even_rows,
    single_process,
)

Ranges = tuple[Interval, ...]
"""Element range of one matrix on each process of a group."""


@dataclass(frozen=True)
class MatrixView:
    """One matrix inside a parameter: elements ``[offset, offset + rows * columns)``, row-major.

    Attributes:
        name: the parameter's name, with an index if it is one of a stack.
        rows: first dimension.
        columns: second dimension.
        offset: first element within the parameter.
    """

    name: str
    rows: int
    columns: int
    offset: int

    @property
    def short(self) -> int:
        """The shorter dimension."""
        return min(self.rows, self.columns)


@dataclass(frozen=True)
class GroupSpec:
    """Specification of one parameter group.

    Attributes:
        holding: what this process holds of it.
        side: `auto`, `left` or `right`.
        shard_basis: store each basis once over the processes.
        views: maps a parameter's name and full shape to the matrices that AdaRankGrad trains;
            empty for a tensor trained by Adam.
        positions: index of each parameter, by name, in the list that the group was built with:
            home processes follow from it, whatever other parameters train now.
        settings: the group's settings as text; must be equal on all processes.
        terms: every process, or every copy of a sharded model, has gradients of its own, whose mean
            is that of the model.
        largest_rank: of a matrix whose shorter dimension is given.
        goes_home: the home process of a matrix computes with all of it.
    """

    holding: Holding
    side: str
    shard_basis: bool
    views: Callable[[str, tuple[int, ...]], list[MatrixView]]
    positions: Mapping[str, int]
    settings: str
    largest_rank: Callable[[int], int]
    goes_home: bool
    terms: bool = False


def matrix_views(name: str, shape: tuple[int, ...], view: str) -> list[MatrixView]:
    """The matrices that a parameter consists of; empty for scalars and vectors.

    Args:
        name: the parameter's name.
        shape: its full shape.
        view: `stack`, `flatten` or `auto`, as in :class:`arg_dist.AdaRankGradConfig`.
    """
    if len(shape) < 2 or 0 in shape:
        return []
    if len(shape) == 2 or view == "flatten" or (view == "auto" and len(shape) > 3):
        return [MatrixView(name, shape[0], math.prod(shape[1:]), 0)]
    rows, columns = shape[-2:]
    count = math.prod(shape[:-2])
    return [MatrixView(f"{name}[{i}]", rows, columns, i * rows * columns) for i in range(count)]


@lru_cache(maxsize=4096)
def clip_ranges(ranges: Ranges, offset: int, numel: int) -> Ranges:
    """Each process's range within a part of a parameter, relative to the part's first element."""
    clipped = []
    for start, stop in ranges:
        low = min(max(start - offset, 0), numel)
        clipped.append((low, max(low, min(stop - offset, numel))))
    return tuple(clipped)


def check_tiling(name: str, ranges: Ranges, numel: int) -> None:
    """Check that the processes' ranges cover a parameter exactly once.

    Raises:
        RuntimeError: they do not; the message has the parameter and the ranges.
    """
    filled = 0
    for start, stop in sorted(r for r in ranges if r[0] < r[1]):
        if start != filled:
            filled = -1
            break
        filled = stop
    if filled != numel:
        raise RuntimeError(
            f"{name}: the processes hold the element ranges {list(ranges)}, which do not cover its "
            f"{numel} elements exactly once; arg_dist does not support this layout of the engine"
        )


def basis_spans_columns(rows: int, columns: int, side: str, transposed: bool) -> bool:
    """Whether the basis spans the columns of the matrix as stored.

    Args:
        rows: first dimension, as stored.
        columns: second dimension, as stored.
        side: `right` (the columns), `left` (the rows), or `auto` (the shorter dimension).
        transposed: the matrix is stored transposed, so the user's sides are swapped.
    """
    if side == "auto":
        if rows == columns:
            return not transposed
        return rows > columns
    return (side == "right") != transposed


def shard_matrix(
    rows: int,
    columns: int,
    ranges: Ranges,
    *,
    me: int,
    spans_columns: bool,
    home: int,
    shard_basis: bool,
    replicated: bool,
    transposed: bool = False,
    terms: bool = False,
    copy_of: tuple[int, ...] | None = None,
) -> MatrixSharding:
    """The sharding of a ``rows x columns`` matrix; process `i` holds the range ``ranges[i]``.

    A row split between processes is touched by all of them and kept by the one that holds its first
    element. The side that is not sharded is kept in proportion to what each process holds.

    Args:
        rows: first dimension.
        columns: second dimension.
        ranges: element range of each process; if `replicated`, the whole matrix for each.
        me: this process's index.
        spans_columns: whether the basis spans the columns.
        home: selects the home process: owner number `home` modulo the number of owners.
        shard_basis: store the basis once over the owners, instead of whole on each.
        replicated: every process holds the whole matrix; work and state are sharded along the
            moment side.
        transposed: the matrix is stored transposed: its rows in the model are the columns here.
        terms: every process has a gradient of its own, if it is not `copy_of`.
        copy_of: it is sharded in several copies, each with a gradient of its own: in which of them
            each process holds its range; what these share is split between the copies.
    """
    moment, basis, elements, owners = _sides(
        rows, columns, ranges, spans_columns, replicated, copy_of
    )
    sharding = MatrixSharding(
        moment=moment,
        basis=basis,
        elements=elements,
        cuts_moment=replicated or spans_columns,
        outputs_are_moment=spans_columns != transposed,
        store=basis.keep if shard_basis else basis.touch,
        owners=owners,
        home=owners[home % len(owners)],
        me=me,
    )
    if copy_of is not None:
        return replace(sharding, terms=Terms(max(copy_of) + 1, _alone(sharding), copy_of))
    return _of_terms(sharding) if terms else sharding


@lru_cache(maxsize=4096)
def _sides(
    rows: int,
    columns: int,
    ranges: Ranges,
    spans_columns: bool,
    replicated: bool,
    copy_of: tuple[int, ...] | None,
) -> tuple[DimensionSharding, DimensionSharding, DimensionSharding, tuple[int, ...]]:
    """The moment side, the basis side, the elements, and the owners, of :func:`shard_matrix`."""
    owners = tuple(i for i, (start, stop) in enumerate(ranges) if start < stop)
    processes = len(ranges)
    if replicated:
        moment_size, basis_size = (rows, columns) if spans_columns else (columns, rows)
        everyone = ((0, moment_size),) * processes
        kept = even_rows(moment_size, processes)
        moment = DimensionSharding(moment_size, kept, kept, everyone)
        full = ((0, basis_size),) * processes
        basis = DimensionSharding(basis_size, full, even_rows(basis_size, processes), full)
        parts = tuple((low * basis_size, high * basis_size) for low, high in kept)
        elements = DimensionSharding(
            rows * columns, parts, parts, ((0, rows * columns),) * processes
        )
    else:
        touched = tuple((a // columns, -(-b // columns)) if a < b else (0, 0) for a, b in ranges)
        first = tuple((-(-a // columns), -(-b // columns)) if a < b else (0, 0) for a, b in ranges)
        split = DimensionSharding(rows, touched, _divided(first, copy_of), touched)
        whole: Rows = tuple((0, columns if a < b else 0) for a, b in ranges)
        parts = _divided(_in_proportion(ranges, rows * columns, columns), copy_of)
        unsplit = DimensionSharding(columns, whole, parts, whole)
        moment, basis = (split, unsplit) if spans_columns else (unsplit, split)
        elements = DimensionSharding(rows * columns, ranges, _divided(ranges, copy_of), ranges)
    return moment, basis, elements, owners


def _divided(rows: Rows, copy_of: tuple[int, ...] | None) -> Rows:
    """The rows of each process, of which those that hold the same have an even part each."""
    if copy_of is None:
        return rows
    copies = max(copy_of) + 1
    return tuple(even_part(each, i, copies) for each, i in zip(rows, copy_of, strict=True))


def _alone(sharding: MatrixSharding) -> MatrixSharding:
    """The same matrix, held by this process alone."""
    return single_process(
        sharding.moment.size,
        sharding.basis.size,
        outputs_are_moment=sharding.outputs_are_moment,
        me=sharding.me,
        processes=sharding.processes,
    )


def _of_terms(averaged: MatrixSharding) -> MatrixSharding:
    """The sharding of a matrix of which every process has a gradient of its own.

    Args:
        averaged: its sharding where every process has the mean of these gradients.
    """
    processes = averaged.processes

    def whole(side: DimensionSharding) -> DimensionSharding:
        everyone = ((0, side.size),) * processes
        return replace(side, touch=everyone, update=everyone)

    return replace(
        averaged,
        moment=whole(averaged.moment),
        basis=whole(averaged.basis),
        elements=whole(averaged.elements),
        terms=Terms(processes, _alone(averaged), tuple(range(processes)), averaged),
    )


def shard_elements(
    ranges: Ranges,
    numel: int,
    replicated: bool,
    *,
    terms: bool = False,
    copy_of: tuple[int, ...] | None = None,
) -> DimensionSharding:
    """The distribution of the elements of a non-matrix tensor over the processes.

    Args:
        ranges: element range of each process.
        numel: number of elements.
        replicated: every process holds all of them.
        terms: and has a gradient of its own.
        copy_of: as of :func:`shard_matrix`.
    """
    if not replicated:
        copies = 1 if copy_of is None else max(copy_of) + 1
        return DimensionSharding(numel, ranges, _divided(ranges, copy_of), ranges, copies)
    kept, everyone = even_rows(numel, len(ranges)), ((0, numel),) * len(ranges)
    if terms:
        return DimensionSharding(numel, everyone, kept, everyone, len(ranges))
    return DimensionSharding(numel, kept, kept, everyone)


def _in_proportion(ranges: Ranges, numel: int, size: int) -> Rows:
    return tuple((a * size // numel, b * size // numel) if a < b else (0, 0) for a, b in ranges)
