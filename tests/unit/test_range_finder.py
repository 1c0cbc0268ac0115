"""Randomized directions against the dense SVD."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import SHAPES, gaussian, geometric, with_spectrum
from tolerances import ENERGY, ORTHONORMAL, ROUNDING

from arg_dist.sharding.drivers import run_local
from arg_dist.subspace.distributed import single_process
from arg_dist.subspace.range_finder import Directions, leading_directions, positive_peaks


def directions(gradient: torch.Tensor, width: int, power_passes: int = 1) -> Directions:
    omega = gaussian(gradient.shape[0], width, seed=3)
    sharding = single_process(*gradient.shape)
    return run_local(
        leading_directions(lambda: gradient, omega, sharding, power_passes=power_passes)
    )


def dense_energies(gradient: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(gradient.double()).square()


@given(SHAPES, st.data())
def test_directions_are_orthonormal_and_ordered_by_the_energy_they_keep(shape, data):
    gradient = gaussian(*shape)
    width = data.draw(st.integers(1, min(shape)))
    found = directions(gradient, width)
    assert found.vectors.shape == (shape[1], width)
    ORTHONORMAL.check(found.vectors.T @ found.vectors, torch.eye(width))
    assert bool((found.energies.diff() <= 0).all())
    ENERGY.check((gradient @ found.vectors).square().sum(0), found.energies)


@given(SHAPES, st.integers(0, 2))
def test_a_sketch_as_wide_as_the_shorter_side_is_exact(shape, power_passes):
    gradient = gaussian(*shape)
    found = directions(gradient, min(shape), power_passes)
    ENERGY.check(found.energies, dense_energies(gradient))


def test_an_exact_sketch_finds_the_singular_vectors():
    gradient = with_spectrum(13, 7, geometric(7, 0.6))
    found = directions(gradient, 7)
    expected = positive_peaks(torch.linalg.svd(gradient.double()).Vh.T)
    ROUNDING.check(found.vectors, expected)


def test_one_power_pass_keeps_nearly_all_that_can_be_kept():
    gradient = with_spectrum(96, 64, 1 / torch.arange(1, 65).sqrt())
    best = dense_energies(gradient)[:8].sum()
    kept = [directions(gradient, 16, passes).energies[:8].sum() / best for passes in (0, 1)]
    assert kept[0] < 0.9 < 0.97 < kept[1] <= 1


@pytest.mark.parametrize("shape", [(11, 5), (5, 11), (1, 6), (6, 1)])
def test_a_rank_one_gradient_has_one_direction(shape):
    gradient = with_spectrum(*shape, [3.0])
    found = directions(gradient, min(shape))
    ENERGY.check(found.energies[0], 9.0)
    ENERGY.check(found.energies[1:], torch.zeros(min(shape) - 1))
    ORTHONORMAL.check(gradient @ found.vectors[:, :1] @ found.vectors[:, :1].T / 3, gradient / 3)


def test_columns_of_zeros_get_no_weight():
    gradient = gaussian(12, 9)
    gradient[:, ::2] = 0
    found = directions(gradient, 4)
    ORTHONORMAL.check(found.vectors[::2], torch.zeros(5, 4))
    ORTHONORMAL.check(found.vectors[1::2].square().sum(0), torch.ones(4))


def test_a_zero_gradient_gives_an_orthonormal_basis_without_energy():
    found = directions(torch.zeros(6, 5), 3)
    ORTHONORMAL.check(found.vectors.T @ found.vectors, torch.eye(3))
    assert torch.equal(found.energies, torch.zeros(3, dtype=torch.float64))


@given(SHAPES)
def test_the_largest_entry_of_each_vector_is_made_positive(shape):
    vectors = gaussian(*shape)
    fixed = positive_peaks(vectors)
    assert torch.equal(fixed, positive_peaks(-vectors))
    assert torch.equal(fixed.abs(), vectors.abs())
    assert torch.equal(fixed.max(0).values, vectors.abs().max(0).values)
