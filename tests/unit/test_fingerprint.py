"""Fingerprints differ if tensors do, and are equal up to rounding if they are."""

from __future__ import annotations

import math

import pytest
import torch
from matrices import gaussian

from arg_dist.subspace import fingerprint as fingerprints
from arg_dist.subspace.fingerprint import TOLERANCE, differ, fingerprint, summary

pytestmark = pytest.mark.unit

LONG = fingerprints.RUN + 77


def numbers(tensor: torch.Tensor) -> list[float]:
    return fingerprint(tensor).tolist()


@pytest.mark.parametrize("shape", [(3,), (48, 31), (2, 5, 7), (LONG,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_equal_tensors_have_equal_fingerprints_wherever_they_lie(shape, dtype):
    tensor = gaussian(*shape).to(dtype)
    assert numbers(tensor) == numbers(tensor.clone())
    assert not differ(numbers(tensor), numbers(tensor.flip(0).contiguous().flip(0)))
    assert not differ(numbers(tensor), numbers(tensor * (1 + TOLERANCE / 10)))


@pytest.mark.parametrize("offset", [0.0, 5.0])
@pytest.mark.parametrize("shape", [(48, 31), (LONG,)])
def test_other_tensors_have_other_fingerprints(shape, offset):
    tensor = gaussian(*shape) + offset
    one_row = tensor.clone()
    one_row[0] = -one_row[0] if len(shape) > 1 else 100.0
    swapped = tensor.flip(0)
    for other in (-tensor, 2 * tensor, swapped, one_row, torch.zeros_like(tensor)):
        assert differ(numbers(tensor), numbers(other))


def test_the_sign_of_a_constant_tensor_and_the_place_of_a_run_are_seen():
    constant = torch.full((LONG,), 0.1)
    assert differ(numbers(constant), numbers(-constant))
    tensor = gaussian(2 * fingerprints.RUN)
    assert differ(numbers(tensor), numbers(tensor.roll(fingerprints.RUN)))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_special_values_equal_themselves_and_nothing_else(value):
    ones = torch.ones(5)
    special = torch.full((5,), value)
    assert not differ(numbers(special), numbers(special))
    assert differ(numbers(special), numbers(ones)) and differ(numbers(ones), numbers(special))


def test_faint_gradients_are_told_apart():
    tensor = gaussian(9, 8) * 1e-25
    assert differ(numbers(tensor), numbers(-tensor))
    assert not differ(numbers(tensor), numbers(tensor.clone()))


def test_a_summary_depends_on_every_fingerprint_and_its_place():
    found = torch.stack([fingerprint(gaussian(6, 5, seed=i)) for i in range(6)]).view(3, 2, 2)
    whole = float(summary(found, [0, 4, 9]))
    for changed in (found.flip(0), found.flip(1), found * torch.tensor([-1.0, 1.0])):
        assert abs(float(summary(changed, [0, 4, 9])) - whole) > TOLERANCE
    one = found.clone()
    one[2, 1, 0] *= -1
    assert abs(float(summary(one, [0, 4, 9])) - whole) > TOLERANCE
    assert math.isfinite(float(summary(torch.zeros_like(found), [0, 4, 9])))
