"""Training with the optimizer in one process: which parameters, which gradients, how far."""

from __future__ import annotations

from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import changing_spectrum, gaussian, geometric, with_spectrum
from one_process import feed, optimizer_of, parameters_of, train
from tolerances import ENERGY, LOW_PRECISION, ORTHONORMAL, ROUNDING
from torch import nn

from arg_dist import AdaRankGrad, ConfigError

FREQUENT = {"min_gap": 3, "max_gap": 5, "lr": 1e-2}
"""Refreshes often enough for a short test."""


@given(st.tuples(st.integers(1, 13), st.integers(1, 13)))
def test_any_shape_trains(shape):
    optimizer = optimizer_of(gaussian(*shape), **FREQUENT)
    weights = train(optimizer, [[gaussian(*shape, seed=seed)] for seed in range(8)])
    assert weights[0].isfinite().all() and not torch.equal(weights[0], gaussian(*shape))
    # where all directions would be kept, plain Adam keeps less
    assert len(optimizer.stats()) == (min(shape) > 4)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 5), (5, 1)])
def test_what_has_no_smaller_rank_is_trained_by_adamw(shape):
    gradients = [[gaussian(*shape, seed=seed)] for seed in range(5)]
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    ours = train(optimizer_of(gaussian(*shape), **settings), gradients)
    theirs = torch.optim.AdamW([nn.Parameter(gaussian(*shape))], **settings)
    ROUNDING.check(ours[0], train(theirs, gradients)[0])


def test_a_stack_of_matrices_is_trained_as_the_matrices_alone():
    shape = (3, 16, 8)  # each at 64 bytes: a product's rounding depends on where its factors start
    stack = gaussian(*shape)
    gradients = [gaussian(*shape, seed=seed) for seed in range(1, 13)]
    together = AdaRankGrad([("x", nn.Parameter(stack.clone()))], max_rank=4, **FREQUENT)
    alone = AdaRankGrad(
        [(f"x[{i}]", nn.Parameter(stack[i].clone())) for i in range(3)], max_rank=4, **FREQUENT
    )
    trained = train(together, [[gradient] for gradient in gradients])[0]
    for i, expected in enumerate(train(alone, gradients)):
        assert torch.equal(trained[i], expected)


def test_a_convolution_is_trained_as_the_flattened_matrix():
    gradients = [gaussian(9, 3, 2, 2, seed=seed) for seed in range(1, 13)]
    kernel = optimizer_of(gaussian(9, 3, 2, 2), **FREQUENT)
    matrix = optimizer_of(gaussian(9, 12), **FREQUENT)
    trained = train(kernel, [[gradient] for gradient in gradients])[0]
    expected = train(matrix, [[gradient.reshape(9, 12)] for gradient in gradients])[0]
    assert torch.equal(trained.reshape(9, 12), expected)


def test_the_update_lies_in_the_basis():
    weight = gaussian(8, 6)
    optimizer = optimizer_of(weight, max_rank=3, min_rank=3, residual="none")
    change = train(optimizer, [[gaussian(8, 6, seed=1)]])[0] - weight
    basis = optimizer.state[parameters_of(optimizer)[0]]["w0"]["basis"]
    ORTHONORMAL.check(basis.T @ basis, torch.eye(3))
    ROUNDING.check(change @ basis @ basis.T, change)
    assert torch.linalg.matrix_rank(change, rtol=1e-3) == 3


def test_scale_and_learning_rate_multiply_the_update_and_decay_the_weight():
    weight, gradient = gaussian(8, 6), [[gaussian(8, 6, seed=1)]]
    unit = train(optimizer_of(weight, lr=1.0, scale=1.0), gradient)[0] - weight
    other = train(optimizer_of(weight, lr=0.1, scale=0.5, weight_decay=0.2), gradient)[0]
    ROUNDING.check(other, (1 - 0.1 * 0.2) * weight + 0.1 * 0.5 * unit)


def test_bf16_weights_move_as_their_fp32_copy_rounded_at_every_step():
    weight = gaussian(8, 6).bfloat16()
    optimizer, copy = optimizer_of(weight, **FREQUENT), optimizer_of(weight.float(), **FREQUENT)
    for seed in range(12):
        gradient = gaussian(8, 6, seed=seed).bfloat16()
        feed(optimizer, gradient)
        feed(copy, gradient)
        rounded = parameters_of(copy)[0].detach()
        LOW_PRECISION.check(parameters_of(optimizer)[0].detach().float(), rounded)
        rounded.copy_(parameters_of(optimizer)[0])
    state = optimizer.state[parameters_of(optimizer)[0]]["w0"]
    assert {state[key].dtype for key in ("basis", "exp_avg", "exp_avg_sq")} == {torch.float32}


@pytest.mark.parametrize("low_rank", [True, False])
def test_fp64_weights_keep_their_digits(low_rank):
    weight = gaussian(8, 6).double() + 1e-12
    optimizer = optimizer_of(weight, lr=1e-20, low_rank=low_rank)
    assert torch.equal(train(optimizer, [[gaussian(8, 6).double()]])[0], weight)


def test_a_frozen_parameter_stays():
    frozen, free = nn.Parameter(gaussian(8, 6), requires_grad=False), nn.Parameter(gaussian(8, 6))
    optimizer = AdaRankGrad([frozen, free], max_rank=4, weight_decay=0.1)
    feed(optimizer, None, gaussian(8, 6))
    assert torch.equal(frozen, gaussian(8, 6)) and not torch.equal(free, gaussian(8, 6))
    assert [entry["name"] for entry in optimizer.stats()] == ["group0.param1"]


def test_a_parameter_may_be_unfrozen_later():
    frozen, free = nn.Parameter(gaussian(8, 6), requires_grad=False), nn.Parameter(gaussian(8, 6))
    optimizer = AdaRankGrad([frozen, free], max_rank=4)
    feed(optimizer, None, gaussian(8, 6))
    frozen.requires_grad_(True)
    feed(optimizer, gaussian(8, 6), gaussian(8, 6))
    assert not torch.equal(frozen, gaussian(8, 6))


def test_a_group_may_be_added_later():
    optimizer = optimizer_of(gaussian(8, 6))
    feed(optimizer, gaussian(8, 6))
    optimizer.add_param_group({"params": [nn.Parameter(gaussian(6, 8))]})
    feed(optimizer, gaussian(8, 6), gaussian(6, 8))
    assert [entry["name"] for entry in optimizer.stats()] == ["w0", "group1.param0"]
    assert [entry["steps_since_refresh"] for entry in optimizer.stats()] == [2, 1]


@pytest.mark.parametrize("shape", [(8, 6), (5,)])
def test_a_missing_gradient_is_a_zero_gradient(shape):
    gradient, zero = gaussian(*shape, seed=1), torch.zeros(shape)
    steps = [None, gradient, None, gradient, gradient, None, None, gradient]
    missing = train(optimizer_of(gaussian(*shape), **FREQUENT), [[step] for step in steps])
    given_zero = [[zero if step is None else step] for step in steps]
    zeros = train(optimizer_of(gaussian(*shape), **FREQUENT), given_zero)
    assert torch.equal(missing[0], zeros[0])


def test_nothing_happens_before_the_first_gradient():
    optimizer = optimizer_of(gaussian(8, 6), gaussian(5), weight_decay=0.1)
    weights = train(optimizer, [[torch.zeros(8, 6), None]] * 3)
    assert torch.equal(weights[0], gaussian(8, 6)) and torch.equal(weights[1], gaussian(5))
    assert optimizer.state_bytes() == 0 and optimizer.stats() == []


def test_a_zero_gradient_keeps_the_basis_even_when_a_refresh_is_due():
    optimizer = optimizer_of(gaussian(8, 6), min_gap=2, max_gap=2)
    train(optimizer, [[gaussian(8, 6, seed=1)]])
    state = optimizer.state[parameters_of(optimizer)[0]]["w0"]
    basis = state["basis"].clone()
    weights = train(optimizer, [[torch.zeros(8, 6)]] * 5)
    assert torch.equal(state["basis"], basis) and state["refreshes"] == 1
    assert weights[0].isfinite().all()
    train(optimizer, [[gaussian(8, 6, seed=2)]])
    assert state["refreshes"] == 2


def test_a_rank_one_gradient_needs_one_direction():
    optimizer = optimizer_of(gaussian(9, 7), min_rank=4, max_rank=6, min_gap=2, max_gap=2)
    weights = train(optimizer, [[with_spectrum(9, 7, [2.0], seed=seed)] for seed in range(8)])
    assert optimizer.stats()[0]["rank"] == 1
    assert weights[0].isfinite().all()


def test_statistics_tell_what_each_matrix_is_doing():
    optimizer = optimizer_of(gaussian(8, 6), gaussian(5), gaussian(6, 8), energy=1.0)
    train(optimizer, [[gaussian(8, 6), gaussian(5), gaussian(6, 8)]] * 3)
    right, left = optimizer.stats()
    energies = torch.linalg.svdvals(gaussian(8, 6)).square()
    ENERGY.check(right.pop("energy"), energies[:4].sum() / energies.sum())
    expected = {"rank": 4, "steps_since_refresh": 3, "refreshes": 1}
    # basis and two moments of four directions, one fp64 number
    assert right == {
        "name": "w0", "shape": (8, 6), "side": "right",
        "state_bytes": 4 * 4 * (6 + 8 + 8) + 8, **expected,
    }  # fmt: skip
    assert (left["name"], left["shape"], left["side"]) == ("w2", (6, 8), "left")


def quadratic(optimizer: AdaRankGrad, goal: torch.Tensor, steps: int) -> float:
    """Share of the squared distance from zero to `goal` that is left."""
    weight = parameters_of(optimizer)[0]
    start = goal.square().sum()
    for _ in range(steps):
        optimizer.zero_grad()
        (weight - goal).square().sum().backward()
        optimizer.step()
    return float((weight.detach() - goal).square().sum() / start)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_a_quadratic_is_solved_though_each_step_is_of_low_rank(shape):
    settings = {"lr": 0.03, "scale": 1.0, "residual": "none", "min_gap": 5, "max_gap": 10}
    settings |= {"energy": 0.65, "min_rank": 4}
    optimizer = optimizer_of(torch.zeros(shape), **settings)
    assert quadratic(optimizer, gaussian(*shape), steps=400) < 1e-2


def test_a_learning_rate_schedule_is_followed():
    optimizer = optimizer_of(torch.zeros(8, 6), lr=1.0, residual_momentum=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1**step)
    gradient, lengths, before = gaussian(8, 6), [], torch.zeros(8, 6)
    for _ in range(3):
        feed(optimizer, gradient)
        scheduler.step()
        after = parameters_of(optimizer)[0].detach().clone()
        lengths.append(float((after - before).norm()))
        before = after
    ROUNDING.check(torch.tensor(lengths) / lengths[0], torch.tensor([1, 0.1, 0.01]))


def test_a_closure_is_evaluated_with_gradients():
    optimizer = optimizer_of(gaussian(8, 6))
    weight = parameters_of(optimizer)[0]

    def closure() -> float:
        loss = weight.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == float(gaussian(8, 6).square().sum())
    assert not torch.equal(weight, gaussian(8, 6))


def moved_by_noise(transport: str) -> list[float]:
    """How far eight relative noises of 1e-6 in the gradients move an MLP's weights.

    Each as a share of the distance travelled, in ascending order.
    """
    start = [gaussian(64, 32, seed=11) / 32**0.5, gaussian(32, 64, seed=12) / 64**0.5]
    inputs, outputs = gaussian(64, 32, seed=13), gaussian(64, 32, seed=14)
    settings = {
        "lr": 1e-2,
        "min_gap": 4,
        "max_gap": 8,
        "max_rank": 16,
        "energy": 0.8,
        "transport": transport,
        "residual": "none",
        "scale": 1.0,
    }
    ends = []
    for run in range(9):
        optimizer = optimizer_of(*start, **settings)
        first, second = parameters_of(optimizer)
        for step in range(60):
            optimizer.zero_grad()
            (torch.relu(inputs @ first.T) @ second.T - outputs).square().mean().backward()
            for i, weight in enumerate((first, second)):
                if run > 0:
                    noise = gaussian(*weight.shape, seed=1000 * run + 10 * step + i)
                    weight.grad *= 1 + 1e-6 * noise
            optimizer.step()
        ends.append(torch.cat([weight.detach().reshape(-1) for weight in (first, second)]))
    way = ends[0] - torch.cat([weight.reshape(-1) for weight in start])
    return sorted(float((end - ends[0]).norm() / way.norm()) for end in ends[1:])


def test_rounding_in_the_gradients_stays_small_because_the_moments_follow_the_basis():
    # whether a single noise tips a near tie of directions is chance, and depends on the processor
    assert median(moved_by_noise("squared")) < 1e-3
    assert max(moved_by_noise("none")) > 0.03


def test_an_engine_may_rename_parameters_before_the_first_step_only():
    optimizer = optimizer_of(gaussian(8, 6), gaussian(8, 6, seed=1))
    optimizer.adopt_names({"w0": "up", "w1": "head"}, full_rank=["head"])
    feed(optimizer, gaussian(8, 6), gaussian(8, 6))
    assert [entry["name"] for entry in optimizer.stats()] == ["up"]
    with pytest.raises(RuntimeError, match="before the first step"):
        optimizer.adopt_names({"up": "down"}, full_rank=[])


def test_weights_that_cannot_be_changed_in_place_are_refused_by_name():
    weight = nn.Parameter(gaussian(6).expand(8, 6))
    optimizer = AdaRankGrad([("w", weight)], max_rank=2, min_rank=1)
    with pytest.raises(ConfigError, match=r"w: has several elements in one place"):
        feed(optimizer, gaussian(8, 6))


def test_energy_decides_the_rank_step_by_step():
    settings = {"max_rank": 8, "energy": 0.95, "hysteresis": 0.0, "min_gap": 2, "max_gap": 2}
    optimizer = optimizer_of(gaussian(12, 9), **settings)
    ranks = []
    for gradient in changing_spectrum(12, 9, (0.3, 0.9), each=2):
        feed(optimizer, gradient)
        ranks.append(optimizer.stats()[0]["rank"])
    squares = [geometric(9, ratio).square() for ratio in (0.3, 0.9)]
    expected = [int((s.cumsum(0) < 0.95 * s.sum()).sum()) + 1 for s in squares]
    assert ranks[::2] == expected


def test_a_grad_scaler_is_refused_where_gradients_are_not_averaged():
    optimizer = optimizer_of(gaussian(6, 4), gradient_sync="sketch")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(parameters_of(optimizer)[0].square().sum()).backward()
    with pytest.raises(RuntimeError, match=r"GradScaler.*train in bf16"):
        scaler.step(optimizer)
    ours = optimizer_of(gaussian(6, 4))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(parameters_of(ours)[0].square().sum()).backward()
    scaler.step(ours)


def test_what_clips_the_mean_of_the_gradients_is_the_optimizer():
    with pytest.raises(ConfigError, match=r"max_grad_norm is for gradient_sync=.sketch"):
        optimizer_of(gaussian(6, 4), max_grad_norm=1.0)
    with pytest.raises(ConfigError, match=r"residual=.scaled. needs the norms"):
        optimizer_of(gaussian(6, 4), gradient_sync="sketch", residual="scaled")
    optimizer = optimizer_of(gaussian(6, 4), gradient_sync="sketch", max_grad_norm=1.0)
    (weight,) = parameters_of(optimizer)
    feed(optimizer, gaussian(6, 4))
    ROUNDING.check(weight.grad.norm(), torch.tensor(1.0))
