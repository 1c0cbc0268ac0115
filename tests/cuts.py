"""Matrices cut into shards: arbitrary element ranges, one shard for each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import torch
from hypothesis import strategies as st
from torch import Tensor

from arg_dist.sharding.blocks import Blocks, shard_blocks
from arg_dist.sharding.fragment import Fragment
from arg_dist.sharding.layout import MatrixView, Ranges, shard_matrix
from arg_dist.sharding.shard import MatrixShard
from arg_dist.subspace.distributed import Rows

WORLD_SIZES = (1, 2, 3, 4, 8)


def ranges_of(cuts: Sequence[int], numel: int) -> Ranges:
    """The element ranges between these cuts."""
    bounds = [0, *sorted(cuts), numel]
    return tuple(pairwise(bounds))


@st.composite
def element_ranges(draw: st.DrawFn, numel: int, processes: int | None = None) -> Ranges:
    """Any cut of `numel` elements: rows cut in the middle, or over several shards; empty shards."""
    count = draw(st.sampled_from(WORLD_SIZES)) if processes is None else processes
    cuts = draw(st.lists(st.integers(0, numel), min_size=count - 1, max_size=count - 1))
    return ranges_of(cuts, numel)


def whole_rows(rows: int, columns: int, processes: int) -> Ranges:
    """Rows dealt out in equal blocks, the last ones smaller or empty, as FSDP does."""
    block = -(-rows // processes)
    return ranges_of([min(i * block, rows) * columns for i in range(1, processes)], rows * columns)


def equal_pieces(numel: int, processes: int) -> Ranges:
    """Flat pieces of one length, whatever rows they cut, as ZeRO-3 does."""
    piece = -(-numel // processes)
    return ranges_of([min(i * piece, numel) for i in range(1, processes)], numel)


def without_bystanders(ranges: Ranges) -> Ranges:
    """Only the processes that hold something; the others have no computation to run."""
    return tuple((start, stop) for start, stop in ranges if start < stop)


def cut_matrix(
    weight: Tensor,
    ranges: Ranges,
    *,
    spans_columns: bool,
    shard_basis: bool = True,
    replicated: bool = False,
    home: int = 0,
    transposed: bool = False,
) -> list[MatrixShard]:
    """One shard for each range, with its own copy of its part of `weight`.

    Where `replicated`, `ranges` says only how many processes there are, and each has everything.
    """
    rows, columns = weight.shape
    if replicated:
        ranges = ((0, weight.numel()),) * len(ranges)
    return [
        MatrixShard(
            me=me,
            unit=0,
            name="w",
            fragment=_fragment(weight, start, stop),
            offset=0,
            range=(start, stop),
            group=0,
            matrix=MatrixView("w", rows, columns, 0),
            sharding=shard_matrix(
                rows,
                columns,
                ranges,
                me=me,
                spans_columns=spans_columns,
                home=home,
                shard_basis=shard_basis,
                replicated=replicated,
                transposed=transposed,
            ),
            spans_columns=spans_columns,
            replicated=replicated,
            phase=0.0,
        )
        for me, (start, stop) in enumerate(ranges)
    ]


def _fragment(weight: Tensor, start: int, stop: int) -> Fragment:
    target = weight.reshape(-1)[start:stop].clone()
    return Fragment("w", tuple(weight.shape), start, stop, target, lambda tensor: tensor)


@st.composite
def block_grids(draw: st.DrawFn, rows: int, columns: int) -> Blocks:
    """Blocks of any grid, in any order; empty ones, and blocks that several processes hold."""
    across, down, copies = (draw(st.integers(1, most)) for most in (3, 3, 2))
    bands = (
        ranges_of(_ends(draw, rows, down), rows),
        ranges_of(_ends(draw, columns, across), columns),
    )
    grid = list(product(*bands))
    return tuple(draw(st.permutations(grid * copies)))


def _ends(draw: st.DrawFn, size: int, parts: int) -> list[int]:
    return draw(st.lists(st.integers(0, size), min_size=parts - 1, max_size=parts - 1))


def held_blocks(blocks: Blocks) -> Blocks:
    """Only those that hold something."""
    return tuple(block for block in blocks if all(low < high for low, high in block))


def cut_in_blocks(
    weight: Tensor,
    blocks: Blocks,
    *,
    spans_columns: bool,
    shard_basis: bool = True,
    home: int = 0,
) -> list[MatrixShard]:
    """One shard for each block, with its own copy of its part of `weight`."""
    rows, columns = weight.shape
    shards = []
    for me, (some_rows, some_columns) in enumerate(blocks):
        target = weight[slice(*some_rows), slice(*some_columns)].clone()
        sharding = shard_blocks(
            rows, columns, blocks, me=me, spans_columns=spans_columns, home=home,
            shard_basis=shard_basis,
        )  # fmt: skip
        shards.append(
            MatrixShard(
                me=me,
                unit=0,
                name="w",
                fragment=Fragment(
                    "w", (rows, columns), 0, target.numel(), target, lambda each: each
                ),
                offset=0,
                range=(0, target.numel()),
                group=0,
                matrix=MatrixView("w", rows, columns, 0),
                sharding=sharding,
                spans_columns=spans_columns,
                replicated=False,
                phase=0.0,
            )
        )
    return shards


def block_of(shard: MatrixShard) -> tuple[slice, slice]:
    """Rows and columns that a shard holds, of a matrix that is cut in blocks."""
    held = (
        slice(*shard.sharding.moment.update[shard.me]),
        slice(*shard.sharding.basis.touch[shard.me]),
    )
    return held if shard.spans_columns else held[::-1]


def part_of(matrix: Tensor, shard: MatrixShard) -> Tensor:
    """A shard's elements of a matrix shaped like its weight."""
    if shard.sharding.blocks:
        return matrix[block_of(shard)].reshape(-1)
    return matrix.reshape(-1)[shard.range[0] : shard.range[1]]


def put_together(parts: Sequence[Tensor], rows: Rows) -> Tensor:
    """The matrix of which process `i` has ``rows[i]``; raises unless every row is there once."""
    held = [(low, part) for (low, high), part in zip(rows, parts, strict=True) if low < high]
    held.sort(key=lambda pair: pair[0])
    matrix = torch.cat([part for _, part in held])
    assert [low + i for low, part in held for i in range(len(part))] == list(range(len(matrix)))
    return matrix


def weight_of(shards: Sequence[MatrixShard]) -> Tensor:
    """The whole weight, from its shards; equal on all of them where everyone has everything."""
    shape = shards[0].fragment.shape
    if shards[0].sharding.blocks:
        whole = torch.full(shape, torch.nan)
        for shard in shards:
            there, held = whole[block_of(shard)], shard.values().view_as(whole[block_of(shard)])
            assert there.isnan().all() or torch.equal(there, held)
            there.copy_(held)
        return whole
    values = [shard.values() for shard in shards]
    if shards[0].replicated:
        assert all(torch.equal(other, values[0]) for other in values)
        values = values[:1]
    return torch.cat(values).view(shape)
