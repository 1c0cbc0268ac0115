"""``gradient_budget``: gradients that the backward pass projects and frees."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from matrices import gaussian
from one_process import parameters_of
from test_replicated_training import STEPS, build
from test_sketched_training import WIDE
from tolerances import CLIPPED, REDUCTION_ORDER, REDUCTION_ORDER_WEIGHTS
from torch import nn

import arg_dist
from arg_dist import AdaRankGrad, ConfigError

MATRICES = 3
"""Of `WIDE`; the last is a vector."""
LARGEST = 4 * 16 * 512
ALL = "1GiB"
RULES = ("none", "matched", "orthogonalized")


def backward(optimizer: AdaRankGrad, step: int, group, pieces: int = 1) -> None:
    """Backward passes of this process's micro-batches, each on gradients of its own."""
    me = 0 if group is None else dist.get_rank(group)
    for piece in range(pieces):
        loss = torch.zeros(())
        for i, weight in enumerate(parameters_of(optimizer)):
            noise = gaussian(*weight.shape, seed=1000 * step + 100 * me + 10 * i + piece)
            loss = loss + (weight * (weight.detach() + noise)).sum() / pieces
        loss.backward()


def whole_bytes(optimizer: AdaRankGrad) -> list[int]:
    """Bytes of each matrix's gradient that is there."""
    matrices = parameters_of(optimizer)[:MATRICES]
    return [0 if weight.grad is None else 4 * weight.grad.numel() for weight in matrices]


def train(group, settings, pieces: int = 1):
    """Losses, weights and ranks, and in each step the bytes of whole gradients."""
    optimizer = build(group, shapes=WIDE, **{"gradient_sync": "sketch", **settings})
    losses, held = [], []
    for step in range(STEPS):
        weights = [weight.detach() for weight in parameters_of(optimizer)]
        losses.append(sum(float(weight.square().mean()) for weight in weights))
        backward(optimizer, step, group, pieces)
        held.append(whole_bytes(optimizer))
        optimizer.step()
        optimizer.zero_grad()
    ranks = {entry["name"]: entry["rank"] for entry in optimizer.stats()}
    return losses, weights, ranks, held


def together(pool, processes: int, *arguments):
    return [train(None, *arguments)] if processes == 1 else pool.run(train, processes, *arguments)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_training_is_to_the_bit_what_it_is_with_whole_gradients(pool, rule, processes):
    # one process by itself has the exact residual, if it has all of the gradient
    several = processes > 1 or rule == "none"
    expected = together(pool, processes, {"residual": rule}) if several else None
    results = together(pool, processes, {"residual": rule, "gradient_budget": ALL})
    _, first, ranks, held = results[0]
    for losses, weights, *_ in results:
        assert all(map(torch.equal, weights, first))
        assert losses[-1] < losses[0]
    if expected is not None:
        assert all(map(torch.equal, first, expected[0][1]))
        assert ranks == expected[0][2]
    assert sum(map(all, held)) >= 1  # all look for their first basis
    assert sum(not any(step) for step in held) > STEPS / 2


@pytest.mark.parametrize("processes", [1, 2])
def test_micro_batches_are_summed_in_the_subspace(pool, processes):
    rule = {"residual": "none"}
    whole = together(pool, processes, rule, 4)[0]
    for losses, weights, ranks, _ in together(pool, processes, {**rule, "gradient_budget": ALL}, 4):
        REDUCTION_ORDER.check(torch.tensor(losses), torch.tensor(whole[0]))
        assert ranks == whole[2]
        for ours, theirs in zip(weights, whole[1], strict=True):
            REDUCTION_ORDER_WEIGHTS.check(ours, theirs)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_residuals_of_micro_batches_are_summed_in_few_bits(pool, bits):
    settings = {"residual_sync_bits": bits, "gradient_budget": ALL}
    results = pool.run(train, 2, settings, 3)
    assert all(map(torch.equal, results[0][1], results[1][1]))
    assert results[0][0][-1] < results[0][0][0]


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("budget", [1, LARGEST + 4 * 96 * 48])
def test_whole_gradients_fit_into_the_budget_or_are_one(pool, processes, budget):
    settings = {"residual": "none", "gradient_budget": budget, "min_gap": 3, "max_gap": 3}
    for losses, _, ranks, held in together(pool, processes, settings):
        assert all(sum(step) <= budget or sum(map(bool, step)) == 1 for step in held)
        assert len({name.partition("[")[0] for name in ranks}) == MATRICES  # all have begun
        turns = [sum(step[i] > 0 for step in held) for i in range(MATRICES)]
        assert min(turns) >= STEPS // 6, turns
        assert losses[-1] < losses[0]


def clipped(group, settings) -> tuple[float, float]:
    """How far the first weights go, with plain gradients and with projected ones."""
    gone = []
    for more in ({}, {"gradient_budget": ALL}):
        optimizer = build(group, shapes=WIDE, gradient_sync="sketch", **settings, **more)
        for step in range(3):
            backward(optimizer, step, group, pieces=1 + step)
            optimizer.step()
            optimizer.zero_grad()
        gone.append(float(parameters_of(optimizer)[0].detach().norm()))
    return gone[0], gone[1]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_mean_is_clipped_alike(pool, processes):
    settings = {"residual": "none", "max_grad_norm": 0.5, "betas": (0.0, 0.0), "eps": 1.0}
    both = [clipped(None, settings)] if processes == 1 else pool.run(clipped, 2, settings)
    for plain, projected in both:
        CLIPPED.check(projected, plain)


# -- on one process -------------------------------------------------------------------------------


def started(**settings) -> AdaRankGrad:
    """An optimizer whose matrices have a basis that is not due."""
    given = {"gradient_sync": "sketch", "gradient_budget": ALL, **settings}
    optimizer = build(None, shapes=WIDE, **given)
    backward(optimizer, 0, None)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def test_what_is_added_to_a_projected_gradient_is_refused():
    optimizer = started()
    backward(optimizer, 1, None)
    weight = parameters_of(optimizer)[0]
    assert weight.grad is None
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match=r"w0: the backward pass has projected and freed"):
        optimizer.step()


def test_a_basis_that_has_changed_since_the_backward_pass_is_refused():
    optimizer = started()
    saved = copy.deepcopy(optimizer.state_dict())
    backward(optimizer, 1, None)
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"w0: its state has changed.*zero_grad\(\)"):
        optimizer.step()
    optimizer.zero_grad()
    backward(optimizer, 1, None)
    optimizer.step()


def test_what_was_projected_is_forgotten_by_zero_grad():
    twice, once = started(), started()
    backward(twice, 7, None)
    twice.zero_grad()
    for optimizer in (twice, once):
        backward(optimizer, 1, None)
        optimizer.step()
    assert all(map(torch.equal, parameters_of(twice), parameters_of(once)))


def test_the_optimizer_that_was_built_last_has_the_gradients():
    before = started()
    groups = [{**group, "params": list(group["params"])} for group in before.param_groups]
    after = AdaRankGrad(groups, process_group=None, gradient_sync="sketch", gradient_budget=ALL)
    for step in range(3):
        weights = [weight.detach().clone() for weight in parameters_of(after)]
        backward(after, step, None)
        after.step()
        after.zero_grad()
        moved = [not torch.equal(*pair) for pair in zip(weights, parameters_of(after), strict=True)]
        assert all(moved)


def test_a_copy_projects_the_gradients_of_its_own_model():
    optimizer = started(residual="none")
    twin = copy.deepcopy(optimizer)
    for each in (optimizer, twin):
        for step in (1, 2):
            backward(each, step, None)
            assert step == 1 or not any(whole_bytes(each))  # a copy is bound in its first step
            each.step()
            each.zero_grad()
    assert all(map(torch.equal, parameters_of(optimizer), parameters_of(twin)))


@pytest.mark.filterwarnings("error")
def test_matrices_without_a_gradient_do_not_keep_others_waiting():
    layers = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(6))
    given = {"gradient_sync": "sketch", "gradient_budget": 1, "residual": "none", "min_gap": 2}
    given |= {"max_rank": 4, "min_rank": 2, "max_gap": 2, "process_group": None}
    optimizer = AdaRankGrad(arg_dist.param_groups(layers), lr=1e-2, **given)
    for step in range(24):
        inputs = gaussian(8, 24, seed=step)
        for layer in layers[3:]:  # the first three are never used
            inputs = layer(inputs)
        inputs.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {entry["name"]: entry["refreshes"] >= 3 for entry in optimizer.stats()} == {
        f"{i}.weight": True for i in (3, 4, 5)
    }


def test_nan_is_told():
    optimizer = started()
    weight = parameters_of(optimizer)[1]
    (weight * torch.nan).sum().backward()
    with pytest.raises(FloatingPointError, match="the gradient of w1 is NaN"):
        optimizer.step()


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"gradient_budget is for gradient_sync=.sketch"):
        build(None, gradient_budget=ALL)
    with pytest.raises(ConfigError, match=r"gradient_budget: every process.*leave shard_basis out"):
        build(None, gradient_budget=ALL, gradient_sync="sketch", shard_basis=True)


def test_a_model_trains_with_tied_weights_and_checkpointing():
    torch.manual_seed(0)
    shared = nn.Linear(24, 24)
    model = nn.Sequential(nn.Linear(12, 24), shared, nn.Tanh(), shared, nn.Linear(24, 12))
    groups = arg_dist.param_groups(model)
    given = {"gradient_sync": "sketch", "gradient_budget": ALL, "residual_sync_bits": 4}
    optimizer = AdaRankGrad(groups, lr=1e-2, process_group=None, max_rank=4, min_rank=2, **given)
    inputs, losses = gaussian(64, 12, seed=1), []
    for _ in range(STEPS):
        output = torch.utils.checkpoint.checkpoint_sequential(model, 2, inputs, use_reentrant=False)
        loss = (output - inputs.roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_gradients_of_matrices_exist_one_at_a_time():
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(32, 32), nn.Tanh())]
    model = nn.Sequential(nn.Linear(16, 32), *layers, nn.Linear(32, 16))
    there: list[int] = []

    def look(_: torch.Tensor) -> None:
        gradients = [p.grad for p in model.parameters() if p.ndim == 2]
        there.append(sum(4 * each.numel() for each in gradients if each is not None))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(look)  # before the optimizer's own
    groups = arg_dist.param_groups(model)
    given = {"gradient_sync": "sketch", "residual": "none", "gradient_budget": 1, "min_gap": 100}
    given |= {"max_rank": 4, "min_rank": 2, "process_group": None}
    optimizer = AdaRankGrad(groups, lr=1e-2, **{"max_gap": 100, **given})
    most = []
    for step in range(12):
        there.clear()
        model(gaussian(8, 16, seed=step)).square().mean().backward()
        most.append(max(there))
        optimizer.step()
        optimizer.zero_grad()
    large, small = 4 * 32 * 32, 4 * 16 * 32
    # the one whose turn it is, from the first layer to the last, and the one that is projected
    turns = [large, large + small, *[2 * large] * 5, small + large]
    assert most == turns + [large] * 4
