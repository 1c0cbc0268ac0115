"""``gradient_sync="sketch"``: training together on gradients that nobody averages."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from matrices import gaussian
from one_process import parameters_of
from test_replicated_training import SETTINGS, STEPS, build
from tolerances import CLIPPED, REDUCTION_ORDER, REDUCTION_ORDER_WEIGHTS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import arg_dist
from arg_dist import AdaRankGrad, ConfigError, checkpoint

TERMS = 12
"""Of which each process of 1, 2, 3 or 4 takes an equal part."""
WIDE = [(96, 48), (16, 512), (3, 48, 36), (31,)]


def both(sent: int, back: int) -> dict[str, int]:
    return {"residual_sync_bits": sent, "residual_back_bits": back}


def own_gradients(optimizer: AdaRankGrad, step: int, group) -> None:
    """Each process's mean of its share of the terms of this step."""
    count = 1 if group is None else dist.get_world_size(group)
    me = 0 if group is None else dist.get_rank(group)
    for i, weight in enumerate(parameters_of(optimizer)):
        mine = range(me * TERMS // count, (me + 1) * TERMS // count)
        terms = [gaussian(*weight.shape, seed=1000 * step + 50 * i + term) for term in mine]
        weight.grad = weight.detach() + torch.stack(terms).mean(0)


def train(group, settings, steps: int = STEPS):
    optimizer = build(group, shapes=WIDE, **{"gradient_sync": "sketch", **settings})
    losses = []
    for step in range(steps):
        own_gradients(optimizer, step, group)
        weights = [weight.detach() for weight in parameters_of(optimizer)]
        losses.append(sum(float(weight.square().mean()) for weight in weights))
        optimizer.step()
    ranks = {entry["name"]: entry["rank"] for entry in optimizer.stats()}
    return losses, weights, ranks, optimizer.comm_bytes()


@pytest.mark.parametrize(
    ("processes", "more"), [(2, {}), (3, {}), (4, {}), (3, {"shard_basis": True})]
)
def test_training_together_without_a_residual_is_training_alone(pool, processes, more):
    settings = {"residual": "none", **more}
    losses, weights, ranks, _ = train(None, settings)
    results = pool.run(train, processes, settings)
    for their_losses, their_weights, their_ranks, _ in results:
        REDUCTION_ORDER.check(torch.tensor(their_losses), torch.tensor(losses))
        assert their_ranks == ranks
        for theirs, first, ours in zip(their_weights, results[0][1], weights, strict=True):
            assert torch.equal(theirs, first)
            REDUCTION_ORDER_WEIGHTS.check(theirs, ours)


@pytest.mark.parametrize("bits", [(1, 1), (2, 2), (4, 4), (1, 2)])
@pytest.mark.parametrize("rule", ["matched", "orthogonalized"])
def test_weights_stay_equal_bit_by_bit_and_few_bits_are_few_bytes(pool, rule, bits):
    settings = {"residual": rule, **both(*bits), "residual_momentum": 0.5}
    results = pool.run(train, 3, settings)
    for _, weights, *_ in results:
        assert all(map(torch.equal, weights, results[0][1]))
    without = pool.run(train, 3, {"residual": "none"})
    more = sum(result[-1] for result in results) - sum(result[-1] for result in without)
    elements = sum(torch.Size(shape).numel() for shape in WIDE[:3])
    codes = 2 * elements * sum(bits) / 8 * STEPS  # to the other two processes, and back
    assert codes * 0.7 < more < codes * 1.4


def clipped(group, settings):
    """Weights after steps on gradients whose mean is far longer than the limit."""
    optimizer = build(group, shapes=WIDE, gradient_sync="sketch", **settings)
    norms = []
    for step in range(4):
        own_gradients(optimizer, step, group)
        optimizer.step()
        mean = [weight.grad.clone() for weight in parameters_of(optimizer)]
        for each in mean:
            if group is not None:
                dist.all_reduce(each, group=group)
                each /= dist.get_world_size(group)
        norms.append(float(torch.cat([each.flatten() for each in mean]).norm()))
    return norms


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_mean_is_clipped(pool, processes):
    settings = {"residual": "none", "max_grad_norm": 0.5}
    results = (
        [clipped(None, settings)] if processes == 1 else pool.run(clipped, processes, settings)
    )
    for norms in results:
        for norm in norms:
            CLIPPED.check(norm, 0.5)


def not_a_number(group) -> str:
    optimizer = build(group, shapes=WIDE, gradient_sync="sketch")
    own_gradients(optimizer, 0, group)
    if dist.get_rank(group) == 1:
        parameters_of(optimizer)[1].grad[0, 0] = torch.nan
    with pytest.raises(FloatingPointError) as raised:
        optimizer.step()
    return str(raised.value)


def test_nan_on_one_process_is_told_on_all(pool):
    assert all("the gradient of w1 is NaN" in told for told in pool.run(not_a_number, 2))


def averaged(group) -> str:
    """The error where DistributedDataParallel averages the gradients all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 4))
    net = DistributedDataParallel(model, process_group=group)
    groups = arg_dist.param_groups(model)
    optimizer = AdaRankGrad(groups, process_group=group, gradient_sync="sketch", **SETTINGS)
    inputs = gaussian(8, 16, seed=dist.get_rank(group))
    net(inputs).square().sum().backward()
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    optimizer.zero_grad()
    assert arg_dist.sketch_only(net) is net
    net(inputs).square().sum().backward()
    optimizer.step()
    return str(raised.value)


def test_gradients_that_are_averaged_all_the_same_are_refused(pool):
    assert all("call arg_dist.sketch_only(model)" in told for told in pool.run(averaged, 2))


def test_a_model_that_is_not_wrapped_needs_no_call():
    with pytest.raises(ConfigError, match=r"sketch_only: got Linear.*needs no call"):
        arg_dist.sketch_only(nn.Linear(2, 2))


HALF = 8


def first_half(group, folder, settings):
    optimizer = build(group, shapes=WIDE, **settings)
    model = nn.ParameterList(parameters_of(optimizer))
    for step in range(HALF):
        take_step(optimizer, step, group)
    checkpoint.save(folder, optimizer, model=model, step=HALF)


def take_step(optimizer: AdaRankGrad, step: int, group) -> float:
    """A step on gradients that are averaged if the optimizer expects that; the loss before it."""
    own_gradients(optimizer, step, group)
    weights = parameters_of(optimizer)
    if group is not None and optimizer.defaults["gradient_sync"] == "engine":
        for weight in weights:
            dist.all_reduce(weight.grad, group=group)
            weight.grad /= dist.get_world_size(group)
    loss = sum(float(weight.detach().square().mean()) for weight in weights)
    optimizer.step()
    return loss


def second_half(group, folder, settings):
    optimizer = build(group, shapes=WIDE, **settings)
    model = nn.ParameterList(parameters_of(optimizer))
    assert checkpoint.load(folder, optimizer, model=model).step == HALF
    losses = [take_step(optimizer, step, group) for step in range(HALF, STEPS)]
    return losses, {entry["name"]: entry["rank"] for entry in optimizer.stats()}


@pytest.mark.parametrize(
    ("before", "after"), [("sketch", "engine"), ("engine", "sketch"), ("sketch", "sketch")]
)
def test_training_resumes_in_the_other_mode_and_on_another_number(pool, tmp_path, before, after):
    settings = {"residual": "none"}
    losses, _, ranks, _ = train(None, settings)
    pool.run(first_half, 3, tmp_path / "half", {**settings, "gradient_sync": before})
    results = pool.run(second_half, 2, tmp_path / "half", {**settings, "gradient_sync": after})
    for their_losses, their_ranks in results:
        REDUCTION_ORDER.check(torch.tensor(their_losses), torch.tensor(losses[HALF:]))
        assert their_ranks == ranks


@pytest.mark.parametrize("bits", [(1, 2), (4, 4)])
def test_the_momentum_of_the_residual_is_saved_and_loaded(pool, tmp_path, bits):
    settings = {"residual_momentum": 0.5, **both(*bits), "gradient_sync": "sketch"}
    pool.run(first_half, 3, tmp_path / "half", settings)
    uninterrupted = pool.run(train, 3, settings)
    results = pool.run(second_half, 3, tmp_path / "half", settings)
    for (losses, _), (expected, *_) in zip(results, uninterrupted, strict=True):
        assert losses == expected[HALF:]
