"""A NaN or infinite gradient changes nothing, and is named."""

from __future__ import annotations

import copy

import pytest
import torch
from matrices import gaussian
from one_process import feed, optimizer_of, parameters_of

WEIGHTS = [gaussian(8, 6, seed=1), gaussian(5, 9, seed=2), gaussian(4, seed=3)]


def broken(position: int, value: float) -> list[torch.Tensor]:
    """Gradients, of which the one at `position` has one entry that is no number."""
    gradients = [weight.clone() for weight in WEIGHTS]
    gradients[position].view(-1)[-1] = value
    return gradients


def trained(**settings):
    optimizer = optimizer_of(*WEIGHTS, **settings)
    for _ in range(3):
        feed(optimizer, *WEIGHTS)
    return optimizer


def snapshot(optimizer):
    """Everything that a step could change."""
    weights = [parameter.detach().clone() for parameter in parameters_of(optimizer)]
    return weights, copy.deepcopy(optimizer.state_dict()["state"])


def assert_unchanged(before, after):
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_the_parameter_is_named_and_nothing_has_changed(position, value):
    optimizer = trained()
    before = snapshot(optimizer)
    with pytest.raises(FloatingPointError, match=f"gradient of w{position} is NaN or infinite"):
        feed(optimizer, *broken(position, value))
    assert_unchanged(before, snapshot(optimizer))


def test_several_are_counted():
    gradients = [broken(i, float("nan"))[i] for i in range(3)]
    with pytest.raises(FloatingPointError, match="gradient of w0 and 2 of 2 others"):
        feed(trained(), *gradients)


def test_steps_can_be_skipped():
    optimizer = trained(nonfinite="skip")
    before = snapshot(optimizer)
    feed(optimizer, *broken(1, float("nan")))
    assert_unchanged(before, snapshot(optimizer))
    assert optimizer.skipped_steps == 1


def test_training_goes_on_as_if_the_step_had_not_been():
    skipping, control = trained(nonfinite="skip"), trained()
    feed(skipping, *broken(0, float("inf")))
    for optimizer in (skipping, control):
        feed(optimizer, *WEIGHTS)
    assert_unchanged(snapshot(control), snapshot(skipping))


def test_the_first_step_may_be_the_broken_one():
    optimizer = optimizer_of(*WEIGHTS)
    with pytest.raises(FloatingPointError):
        feed(optimizer, *broken(0, float("nan")))
    feed(optimizer, *WEIGHTS)
    control = optimizer_of(*WEIGHTS)
    feed(control, *WEIGHTS)
    assert_unchanged(snapshot(control), snapshot(optimizer))


@pytest.mark.parametrize("size", [1e-30, 1e15])
def test_finite_gradients_of_any_usual_size_are_no_fault(size):
    optimizer = optimizer_of(*WEIGHTS)
    feed(optimizer, *(size * weight for weight in WEIGHTS))
    assert all(parameter.isfinite().all() for parameter in parameters_of(optimizer))


def test_a_gradient_too_large_for_its_square_is_as_bad_as_an_infinite_one():
    optimizer = trained(min_gap=3, max_gap=3)
    before = snapshot(optimizer)
    with pytest.raises(FloatingPointError, match="gradient of w1"):
        feed(optimizer, WEIGHTS[0], 1e25 * WEIGHTS[1], WEIGHTS[2])
    assert_unchanged(before, snapshot(optimizer))
