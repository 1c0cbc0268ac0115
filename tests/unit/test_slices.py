"""Parts of tensors are put together out of slices, in either order of the elements, and boxes."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import gaussian
from safetensors.torch import save_file

from arg_dist.checkpoint import slices
from arg_dist.checkpoint.index import CheckpointError, Index, SlicedTensor, Weight, file_name

KEY = "weight/w"


def reader_of(folder: Path, stored: torch.Tensor, cuts: list[int]) -> tuple:
    """Writes a row of elements, cut there, as processes would; a reader, and where it lies."""
    bounds = [0, *sorted(cuts), len(stored)]
    parts = []
    for process, (low, high) in enumerate(itertools.pairwise(bounds)):
        part = {KEY: stored[low:high].clone()} if low < high else {}
        save_file(part, folder / file_name(process, len(bounds) - 1))
        parts += [(process, low, high)] if part else []
    index = Index.model_construct(world_size=len(bounds) - 1, random_states=[])
    sliced = SlicedTensor(shape=(len(stored),), dtype="float32", slices=parts)
    return slices.SliceReader(folder, index), sliced


@given(st.data(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 30), st.booleans())
def test_elements_are_read_in_either_order(
    tmp_path_factory, data, rows, columns, block, transposed
):
    matrix = gaussian(rows, columns)
    position = st.integers(0, matrix.numel())
    cuts = data.draw(st.lists(position, max_size=3))
    wanted = tuple(sorted((data.draw(position), data.draw(position))))
    folder = tmp_path_factory.mktemp("slices")
    stored = (matrix.T if transposed else matrix).reshape(-1)
    reader, sliced = reader_of(folder, stored, cuts)
    entry = Weight(shape=(rows, columns), transposed=transposed, elements=sliced, kind="trained")
    usual, slices.BLOCK_ELEMENTS = slices.BLOCK_ELEMENTS, block
    try:
        with reader:
            for order in (False, True):
                whole = (matrix.T if order else matrix).reshape(-1)
                found = reader.elements(entry, sliced, KEY, (wanted,), transposed=order)
                assert torch.equal(found, whole[slice(*wanted)])
                assert found.untyped_storage().nbytes() == found.nbytes
    finally:
        slices.BLOCK_ELEMENTS = usual


def cuts_of(shape):
    """In each dimension the bounds of intervals that cover it, some of them empty."""
    each = [st.lists(st.integers(0, size), max_size=2) for size in shape]
    return st.tuples(*each).map(
        lambda cuts: [[0, *sorted(cut), n] for cut, n in zip(cuts, shape, strict=True)]
    )


def box_of(shape):
    """An interval in each dimension."""
    each = [st.tuples(st.integers(0, n), st.integers(0, n)) for n in shape]
    return st.tuples(*each).map(lambda box: tuple(tuple(sorted(bounds)) for bounds in box))


def in_boxes(folder: Path, stored: torch.Tensor, cuts: list[list[int]]) -> tuple:
    """Writes a tensor in the boxes of a grid, one by each process; a reader, and where it lies."""
    boxes = list(itertools.product(*map(itertools.pairwise, cuts)))
    parts = []
    for process, box in enumerate(boxes):
        part = stored[tuple(slice(*bounds) for bounds in box)].clone()
        save_file({KEY: part} if part.numel() else {}, folder / file_name(process, len(boxes)))
        parts += [(process, *itertools.chain(*box))] if part.numel() else []
    index = Index.model_construct(world_size=len(boxes), random_states=[])
    sliced = SlicedTensor(shape=stored.shape, dtype="float32", slices=parts)
    return slices.SliceReader(folder, index), sliced


shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3)


@given(st.data(), shapes, st.integers(1, 30))
def test_what_lies_in_boxes_is_read_as_ranges_and_as_boxes(tmp_path_factory, data, shape, block):
    tensor = torch.arange(float(math.prod(shape))).view(shape)
    folder = tmp_path_factory.mktemp("slices")
    reader, sliced = in_boxes(folder, tensor, data.draw(cuts_of(shape)))
    check_reading(data, reader, sliced, tensor, block, transposed=False)


@given(st.data(), shapes, st.integers(1, 30), st.booleans())
def test_boxes_are_read_of_what_lies_in_ranges(tmp_path_factory, data, shape, block, transposed):
    transposed = transposed and len(shape) == 2
    tensor = torch.arange(float(math.prod(shape))).view(shape)
    flat = (tensor.T if transposed else tensor).reshape(-1)
    cuts = data.draw(st.lists(st.integers(0, flat.numel()), max_size=3))
    reader, sliced = reader_of(tmp_path_factory.mktemp("slices"), flat, cuts)
    check_reading(data, reader, sliced, tensor, block, transposed=transposed)


def check_reading(data, reader, sliced, tensor, block, *, transposed):
    """Reads a range of elements, and a box."""
    shape = tuple(tensor.shape)
    entry = Weight(shape=shape, transposed=transposed, elements=sliced, kind="trained")
    (wanted,), box = data.draw(box_of([tensor.numel()])), data.draw(box_of(shape))
    usual, slices.BLOCK_ELEMENTS = slices.BLOCK_ELEMENTS, block
    try:
        with reader:
            for order in {False, len(shape) == 2}:
                whole = (tensor.T if order else tensor).reshape(-1)
                found = reader.elements(entry, sliced, KEY, (wanted,), transposed=order)
                assert torch.equal(found, whole[slice(*wanted)])
            found = reader.elements(entry, sliced, KEY, box, transposed=False)
            assert torch.equal(found, tensor[tuple(slice(*bounds) for bounds in box)])
    finally:
        slices.BLOCK_ELEMENTS = usual


def test_rows_that_nobody_wrote_are_an_error(tmp_path):
    reader, sliced = reader_of(tmp_path, torch.arange(10.0), [4])
    hole = sliced.model_copy(update={"slices": [sliced.slices[0], (1, 5, 10)]})
    with (
        reader,
        pytest.raises(CheckpointError, match="has 9 of the 10 rows or elements in 0 to 10"),
    ):
        reader.rows(hole, KEY, (0, 10))
