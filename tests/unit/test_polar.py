"""Newton-Schulz's polar factor, and what it makes of a residual."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from matrices import gaussian, with_spectrum
from one_process import one_step
from tolerances import ROUNDING

from arg_dist.subspace.residual import polar_factor, with_equal_rows

sizes = st.integers(1, 24)
STEPS = 5


def of_norm_1(matrix: torch.Tensor) -> torch.Tensor:
    return matrix / matrix.norm()


@given(sizes, sizes, st.integers(0, 9))
def test_large_singular_values_become_about_one_and_directions_stay(m, n, seed):
    matrix = of_norm_1(gaussian(m, n, seed=seed)).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    factor = polar_factor(matrix, STEPS)
    found = left.T @ factor @ right.T
    large = values > 0.02
    assert ((found.diagonal()[large] > 0.65) & (found.diagonal()[large] < 1.25)).all()
    ROUNDING.check(found - found.diagonal().diag(), torch.zeros_like(found))


@given(sizes, sizes)
def test_the_factor_of_the_transpose_is_the_transpose(m, n):
    matrix = of_norm_1(gaussian(m, n)).double()
    ROUNDING.check(polar_factor(matrix.T.clone(), STEPS), polar_factor(matrix.clone(), STEPS).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (6, 9)])
def test_nothing_comes_of_nothing_and_one_row_keeps_its_direction(shape, dtype):
    zero = torch.zeros(shape, dtype=dtype)
    assert torch.equal(polar_factor(with_equal_rows(zero.clone()), STEPS), zero)
    if 1 in shape:
        row = of_norm_1(gaussian(*shape))
        factor = polar_factor(row.to(dtype, copy=True), STEPS).float()
        assert torch.nn.functional.cosine_similarity(factor.view(-1), row.view(-1), 0) > 0.999
        assert 0.65 < factor.norm() < 1.25


def test_rows_become_equal_but_for_those_of_nothing():
    matrix = gaussian(6, 9) * torch.tensor([1e-1, 1, 3, 0, 1e-9, 1])[:, None]
    norms = with_equal_rows(of_norm_1(matrix)).norm(dim=1) * 6**0.5
    assert ((norms[[0, 1, 2, 5]] > 0.99) & (norms[[0, 1, 2, 5]] <= 1.001)).all()
    assert norms[3] == 0
    assert norms[4] < 1e-5  # rounding, not a direction


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e12])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_the_size_of_the_gradient_does_not_matter(shape, size):
    gradient = gaussian(*shape)
    settings = {"max_rank": 3, "min_rank": 3, "eps": 0.0}
    plain, scaled = (one_step(each, {}, **settings) for each in (gradient, size * gradient))
    assert plain.outside.square().mean().sqrt() == pytest.approx(0.85, abs=0.25)
    torch.testing.assert_close(scaled.outside, plain.outside, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(16, 10), (10, 16)])
def test_a_gradient_that_the_basis_keeps_whole_leaves_no_noise_to_follow(shape):
    """What is left is rounding; lifted to full size it would be a random walk."""
    spectrum = torch.tensor([3.0, 2.0, 1.0] + [0.0] * 7)
    update = one_step(with_spectrum(*shape, spectrum), {}, max_rank=5, min_rank=5)
    assert update.outside.abs().max() < 0.02


@pytest.mark.parametrize("shape", [(16, 10), (10, 16)])
def test_what_is_outside_has_no_part_inside(shape):
    update = one_step(gaussian(*shape), {}, max_rank=4, min_rank=4)
    outside = update.outside.view(*shape)
    assert (outside @ update.basis).norm() < 1e-3 * outside.norm()
