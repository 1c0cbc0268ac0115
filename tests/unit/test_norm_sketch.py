"""The norm of a sum from sketches of its terms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import gaussian, whole_numbers

from arg_dist.subspace.norm_sketch import BUCKETS, norm_sketch

pytestmark = pytest.mark.unit


@given(st.integers(0, 5 * BUCKETS), st.sampled_from([torch.float32, torch.bfloat16]))
def test_it_is_linear(count, dtype):
    terms = [whole_numbers(count, seed=i).to(dtype) for i in range(3)]
    together = norm_sketch(torch.stack(terms).sum(0), "w|1")
    assert torch.equal(sum(norm_sketch(term, "w|1") for term in terms), together)


def test_parts_that_are_named_differently_add_up_to_the_norm_of_the_whole():
    parts = [gaussian(40, 70, seed=i) for i in range(3)]
    exact = float(torch.stack(parts).norm())
    told = [
        float(sum(norm_sketch(part, f"w|{i}|{step}") for i, part in enumerate(parts)).norm())
        for step in range(200)
    ]
    assert abs(sum(told) / len(told) / exact - 1) < 0.01


@pytest.mark.parametrize("rank", [1, 4, None])
def test_the_norm_is_known_to_a_few_percent(rank):
    gradient = gaussian(96, 640) if rank is None else gaussian(96, rank) @ gaussian(rank, 640)
    exact = float(gradient.norm())
    told = torch.tensor(
        [float(norm_sketch(gradient, f"w|{step}").norm()) / exact for step in range(200)]
    )
    assert abs(float(told.mean()) - 1) < 0.01
    assert float(told.std()) < 0.05
    assert len(set(told.tolist())) == 200
