"""Sketch matrices depend on what is sketched, not on who sketches it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_process import one_step

from arg_dist.subspace.sketch import BLOCK, gaussian_rows

ROWS = 2 * BLOCK + 17


def rows(low: int, high: int, **changes) -> torch.Tensor:
    return gaussian_rows((low, high), 5, **{"seed": 0, "name": "w", "refresh": 0, **changes})


@given(st.lists(st.integers(0, ROWS), min_size=0, max_size=4))
def test_any_cut_of_the_rows_draws_the_same_matrix(cuts):
    bounds = [0, *sorted(cuts), ROWS]
    parts = [rows(low, high) for low, high in pairwise(bounds)]
    assert torch.equal(torch.cat(parts), rows(0, ROWS))


@pytest.mark.parametrize("changes", [{"seed": 1}, {"name": "v"}, {"refresh": 1}])
def test_another_seed_name_or_refresh_draws_another_matrix(changes):
    assert not torch.equal(rows(0, 9, **changes), rows(0, 9))


def test_every_refresh_draws_a_new_sketch():
    state, bases, gradient = {}, [], torch.eye(9)
    for _ in range(3):
        one_step(gradient, state, max_rank=3, min_gap=1, max_gap=1, oversample=0, power_passes=0)
        bases.append(state["basis"])
    assert not torch.equal(bases[0], bases[1]) and not torch.equal(bases[1], bases[2])


def test_no_random_state_is_read_or_changed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = rows(0, 9)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(rows(0, 9), first)


def test_entries_are_standard_normal_and_blocks_differ():
    sketch = gaussian_rows((0, 40 * BLOCK), 10, seed=0, name="w", refresh=0)
    assert abs(sketch.mean()) < 0.02 and abs(sketch.std() - 1) < 0.02
    assert not torch.equal(sketch[:BLOCK], sketch[BLOCK : 2 * BLOCK])
