"""A matrix as the product of two thin ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import gaussian
from tolerances import ROUNDING

from arg_dist.subspace.factors import factored

sizes = st.integers(1, 40)


@given(sizes, sizes, st.integers(1, 40))
def test_the_error_is_that_of_the_best_factors_of_the_rank(rows, columns, rank):
    matrix = gaussian(rows, columns, seed=rows * 41 + columns)
    found = factored(matrix, rank=rank)
    assert found.rank == min(rank, rows, columns)
    missing = (matrix - found.left @ found.right).norm() / matrix.norm()
    ROUNDING.check(torch.tensor(found.error), missing)
    values = torch.linalg.svdvals(matrix.double())
    best = float(values[found.rank :].norm() / values.norm())
    assert found.error <= 1.05 * best + 1e-5


@given(sizes, sizes, st.floats(0.05, 1.0))
def test_the_fewest_directions_with_the_energy_are_kept(rows, columns, energy):
    matrix = gaussian(rows, columns, seed=rows * 41 + columns)
    matrix = matrix * torch.linspace(1, 0.05, columns)
    found = factored(matrix, energy=energy)
    assert found.error**2 <= 1 - energy + 1e-5
    values = torch.linalg.svdvals(matrix.double()).square()
    needed = int((values.cumsum(0) / values.sum() < energy).sum()) + 1
    assert found.rank <= min(len(values), needed + 1) or energy == 1


def test_factors_are_the_same_every_time_and_leave_the_random_numbers_alone():
    matrix = gaussian(60, 50)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = factored(matrix, rank=4)
    assert torch.equal(torch.rand(3), expected)
    other = factored(matrix, rank=4)
    assert torch.equal(one.left, other.left) and torch.equal(one.right, other.right)
    assert one.error == pytest.approx(other.error)
