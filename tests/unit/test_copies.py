"""Copies of the optimizer train on as the original does, or are refused when they are made."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrices import gaussian
from one_process import feed, optimizer_of, parameters_of, train
from torch import Tensor, nn

import arg_dist
from arg_dist import AdaRankGrad
from arg_dist.copying import CARRIED, RENEWED

FREQUENT = {"lr": 1e-2, "max_rank": 4, "min_rank": 2, "min_gap": 3, "max_gap": 4}


def model_and_optimizer(**settings: Any) -> tuple[nn.Module, AdaRankGrad]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    return model, AdaRankGrad(arg_dist.param_groups(model), **{**FREQUENT, **settings})


def trained(model: nn.Module, optimizer: AdaRankGrad, steps: int) -> Tensor:
    """The weights after these steps."""
    batch = torch.linspace(-1, 1, 64).view(4, 16)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(batch) - batch).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def through_torch_save(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "oldest protocol": lambda pair: pickle.loads(pickle.dumps(pair, protocol=2)),
    "torch.save": through_torch_save,
    "a copy of a copy": lambda pair: copy.deepcopy(pickle.loads(pickle.dumps(pair))),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize(
    "settings", [{}, {"state_budget": 6000}, {"process_group": None}, {"residual": "scaled"}]
)
def test_a_copied_pair_trains_on_as_the_original(way, before, settings):
    model, optimizer = model_and_optimizer(**settings)
    trained(model, optimizer, before)
    twin, other = WAYS[way]((model, optimizer))
    expected = trained(model, optimizer, 7)
    assert torch.equal(trained(twin, other, 7), expected)
    assert (other.calls, other.stats()) == (optimizer.calls, optimizer.stats())
    # neither changes the other
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in model.parameters()]), expected)
    assert torch.equal(trained(model, optimizer, 3), trained(twin, other, 3))


def test_a_copy_of_the_optimizer_alone_has_parameters_of_its_own_as_in_torch():
    optimizer = optimizer_of(gaussian(8, 6), gaussian(5), **FREQUENT)
    steps = [[gaussian(8, 6, seed=seed), gaussian(5, seed=seed)] for seed in range(12)]
    train(optimizer, steps[:5])
    other = copy.deepcopy(optimizer)
    assert not {*map(id, parameters_of(other))} & {*map(id, parameters_of(optimizer))}
    for ours, theirs in zip(train(optimizer, steps[5:]), train(other, steps[5:]), strict=True):
        assert torch.equal(ours, theirs)


def test_a_shallow_copy_shares_parameters_and_state_as_in_torch():
    steps = [[gaussian(8, 6, seed=seed)] for seed in range(8)]
    expected = train(optimizer_of(gaussian(8, 6), **FREQUENT), steps)
    optimizer = optimizer_of(gaussian(8, 6), **FREQUENT)
    train(optimizer, steps[:4])
    other = copy.copy(optimizer)
    assert other.state is optimizer.state and other.param_groups is optimizer.param_groups
    assert torch.equal(train(other, steps[4:])[0], expected[0])


def test_names_and_full_rank_choices_travel():
    optimizer = optimizer_of(gaussian(8, 6), gaussian(8, 6, seed=1))
    optimizer.adopt_names({"w0": "up", "w1": "head"}, full_rank=["head"])
    other = pickle.loads(pickle.dumps(optimizer))
    feed(other, gaussian(8, 6), gaussian(8, 6))
    assert [entry["name"] for entry in other.stats()] == ["up"]


def test_skipped_steps_and_frozen_parameters_travel():
    optimizer = optimizer_of(gaussian(8, 6), gaussian(6, 8), nonfinite="skip")
    feed(optimizer, gaussian(8, 6), gaussian(6, 8))
    parameters_of(optimizer)[0].requires_grad_(False)
    feed(optimizer, None, gaussian(6, 8) * torch.inf)
    other = copy.deepcopy(optimizer)
    assert (other.calls, other.skipped_steps) == (2, 1)
    for each in (optimizer, other):
        parameters_of(each)[0].requires_grad_(True)
        feed(each, gaussian(8, 6, seed=2), gaussian(6, 8, seed=2))
    for ours, theirs in zip(parameters_of(optimizer), parameters_of(other), strict=True):
        assert torch.equal(ours, theirs)


def test_loaded_state_that_has_not_been_stepped_travels():
    optimizer = optimizer_of(gaussian(8, 6), **FREQUENT)
    steps = [[gaussian(8, 6, seed=seed)] for seed in range(9)]
    train(optimizer, steps[:5])
    loaded = optimizer_of(parameters_of(optimizer)[0].detach(), **FREQUENT)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other = copy.deepcopy(loaded)
    assert torch.equal(train(other, steps[5:])[0], train(optimizer, steps[5:])[0])


def test_a_copy_can_load_save_and_take_further_groups():
    optimizer = optimizer_of(gaussian(8, 6), **FREQUENT)
    train(optimizer, [[gaussian(8, 6)]] * 2)
    other = pickle.loads(pickle.dumps(optimizer))
    other.add_param_group({"params": [nn.Parameter(gaussian(6, 8))]})
    feed(other, gaussian(8, 6), gaussian(6, 8))
    assert other.state_dict()["calls"] == 3
    twin = copy.deepcopy(other)
    twin.load_state_dict(other.state_dict())
    feed(other, gaussian(8, 6), gaussian(6, 8))
    feed(twin, gaussian(8, 6), gaussian(6, 8))
    assert torch.equal(parameters_of(other)[1], parameters_of(twin)[1])


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_scheduler_copied_along_goes_on(way):
    model, optimizer = model_and_optimizer()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])

    def run(model: nn.Module, optimizer: AdaRankGrad, scheduler: Any) -> Tensor:
        for _ in range(3):
            weights = trained(model, optimizer, 1)
            scheduler.step()
        return weights

    run(model, optimizer, scheduler)
    twin, other, theirs = WAYS[way]((model, optimizer, scheduler))
    assert theirs.optimizer is other
    assert torch.equal(run(twin, other, theirs), run(model, optimizer, scheduler))
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_hooks_are_not_copied_as_in_torch():
    seen = []
    for build in (torch.optim.AdamW, AdaRankGrad):
        optimizer = build([nn.Parameter(gaussian(8, 6))])
        optimizer.register_step_post_hook(lambda *_: seen.append(1))
        feed(copy.deepcopy(optimizer), gaussian(8, 6))
        assert not seen


def test_averaged_models_do_not_disturb_the_optimizer():
    model, optimizer = model_and_optimizer()
    expected = trained(*model_and_optimizer(), 6)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(6):
        weights = trained(model, optimizer, 1)
        averaged.update_parameters(model)
    assert torch.equal(weights, expected)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("held", [[torch.zeros(48)], []])
def test_parameters_that_an_engine_has_replaced_are_refused_at_the_copy(duplicate, held):
    optimizer = optimizer_of(gaussian(8, 6))
    optimizer.param_groups[0]["params"] = held
    with pytest.raises(RuntimeError, match="an engine has replaced the parameters of group 0"):
        duplicate(optimizer)


class Unpicklable:
    def __reduce__(self):
        raise TypeError("cannot pickle this")


def test_a_process_group_is_shared_by_copies_and_refused_in_pickles():
    optimizer = optimizer_of(gaussian(8, 6), process_group=Unpicklable())
    assert copy.deepcopy(optimizer).process_group is optimizer.process_group
    assert copy.copy(optimizer).process_group is optimizer.process_group
    with pytest.raises(RuntimeError, match="process_group: got a Unpicklable"):
        pickle.dumps(optimizer)


def test_a_pickle_of_another_version_is_refused():
    optimizer = optimizer_of(gaussian(8, 6))
    state = {k: v for k, v in optimizer.__getstate__().items() if k not in ("calls", "_budget")}
    with pytest.raises(
        RuntimeError, match=r"another version of arg_dist and has no _budget, calls"
    ):
        AdaRankGrad.__new__(AdaRankGrad).__setstate__(state)


def test_every_attribute_is_carried_or_renewed():
    ours = set(vars(optimizer_of(gaussian(8, 6))))
    torchs = set(vars(torch.optim.AdamW([nn.Parameter(gaussian(8, 6))])))
    assert ours - torchs == {*CARRIED, *RENEWED}
