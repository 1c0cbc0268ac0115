"""Rows of tensors are put together out of slices, in either order of the elements."""

from __future__ import annotations

import itertools
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
                found = reader.elements(entry, sliced, KEY, wanted, transposed=order)
                assert torch.equal(found, whole[slice(*wanted)])
                assert found.untyped_storage().nbytes() == found.nbytes
    finally:
        slices.BLOCK_ELEMENTS = usual


def test_rows_that_nobody_wrote_are_an_error(tmp_path):
    reader, sliced = reader_of(tmp_path, torch.arange(10.0), [4])
    hole = sliced.model_copy(update={"slices": [sliced.slices[0], (1, 5, 10)]})
    with reader, pytest.raises(CheckpointError, match="has 9 of the 10 rows 0 to 10"):
        reader.rows(hole, KEY, (0, 10))
