"""Parameters that are moved, reshaped or replaced while the optimizer lives."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from matrices import gaussian
from one_process import feed, optimizer_of, parameters_of, train
from torch import nn

import arg_dist
from arg_dist import AdaRankGrad, ConfigError
from arg_dist.state import move_state

FREQUENT = {"lr": 1e-2, "max_rank": 4, "min_rank": 2, "min_gap": 3, "max_gap": 4}


@pytest.fixture
def swapping():
    """Modules move their parameters by ``swap_tensors``, as they do those of sharded tensors."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))


def optimizer_for(model: nn.Module, **settings: object) -> AdaRankGrad:
    return AdaRankGrad(arg_dist.param_groups(model), **{**FREQUENT, **settings})


def step(model: nn.Module, optimizer: AdaRankGrad) -> None:
    optimizer.zero_grad()
    weight = next(model.parameters())
    batch = torch.linspace(-1, 1, 64, dtype=weight.dtype).view(4, 16)
    (model(batch) - batch).square().mean().backward()
    optimizer.step()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


MOVES = {
    "cpu": lambda model: model.cpu(),
    "there and back": lambda model: model.double().float(),
    "half way": lambda model: model.to(torch.float64).to(torch.float32).to("cpu"),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_model_may_be_moved_between_steps_by_swapping(swapping, move, with_gradients):
    expected, model = model_of(), model_of()
    theirs, ours = optimizer_for(expected), optimizer_for(model)
    for _ in range(8):
        MOVES[move](model)
        step(model, ours)
        step(expected, theirs)
        if not with_gradients:
            ours.zero_grad()
        MOVES[move](model)
    assert torch.equal(weights(model), weights(expected))
    assert ours.stats() == theirs.stats()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_may_change_its_type(dtype):
    model = model_of()
    optimizer = optimizer_for(model)
    for _ in range(3):
        step(model, optimizer)
    model.to(dtype)
    before = weights(model)
    for _ in range(3):
        step(model, optimizer)
    assert weights(model).dtype == dtype and not torch.equal(weights(model), before)
    assert [entry["steps_since_refresh"] for entry in optimizer.stats()]


def test_state_follows_to_another_device():
    optimizer = optimizer_of(gaussian(8, 6), **FREQUENT)
    feed(optimizer, gaussian(8, 6))
    state = optimizer.state[parameters_of(optimizer)[0]]["w0"]
    before = dict(state)
    move_state(state, torch.device("cpu"))
    assert all(state[key] is before[key] for key in before)
    move_state(state, torch.device("meta"))
    kinds = {value.device.type for value in state.values() if isinstance(value, torch.Tensor)}
    assert kinds == {"meta"} and state["rank"] == before["rank"]


@pytest.mark.parametrize("shape", [(9, 6), (8, 7), (6, 8), (48,)])
def test_a_parameter_of_another_shape_is_refused_until_its_state_is_deleted(shape):
    optimizer = optimizer_of(gaussian(8, 6), gaussian(6, 8), **FREQUENT)
    feed(optimizer, gaussian(8, 6), gaussian(6, 8))
    grown, other = parameters_of(optimizer)
    grown.data, grown.grad = gaussian(*shape), None
    kept = other.detach().clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"w0: .* \(shape \(8, 6\), now "):
            feed(optimizer, gaussian(*shape), gaussian(6, 8))
    assert torch.equal(grown, gaussian(*shape)) and torch.equal(other, kept)
    del optimizer.state[grown]
    feed(optimizer, gaussian(*shape), gaussian(6, 8))
    assert bool((grown != gaussian(*shape)).all())
    assert {entry["name"]: entry["steps_since_refresh"] for entry in optimizer.stats()}["w1"] == 2


def test_a_parameter_may_be_reshaped_before_its_first_step():
    optimizer = optimizer_of(gaussian(8, 6), **FREQUENT)
    optimizer.bind()
    parameters_of(optimizer)[0].data = gaussian(9, 6)
    feed(optimizer, gaussian(9, 6))
    assert optimizer.stats()[0]["shape"] == (9, 6)
    assert optimizer.held_elements() == 54


def test_a_parameter_replaced_in_its_group_is_trained_in_its_place():
    expected = optimizer_of(gaussian(8, 6), **FREQUENT)
    optimizer = optimizer_of(gaussian(8, 6), **FREQUENT)
    steps = [[gaussian(8, 6, seed=seed)] for seed in range(8)]
    train(optimizer, steps[:4])
    [old], new = parameters_of(optimizer), nn.Parameter(gaussian(8, 6))
    new.data.copy_(old)
    optimizer.param_groups[0]["params"][0] = new
    optimizer.state[new] = optimizer.state.pop(old)  # as those do who grow a scene's points
    assert torch.equal(train(optimizer, steps[4:])[0], train(expected, steps)[0])
    assert optimizer.parameter_names() == {id(new): "w0"}
    gone = weakref.ref(old)
    old.grad = None
    del old
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("named", [True, False])
def test_groups_may_be_put_back_with_other_tensors(named):
    """As Composer does when it shards a model whose optimizer is there already."""
    torch.manual_seed(0)
    layers = [nn.Embedding(40, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 40)]
    model = nn.Sequential(*layers)
    straight = nn.Sequential(*copy.deepcopy(layers))

    def build(of: nn.Module) -> AdaRankGrad:
        return AdaRankGrad(of if named else of.parameters(), **FREQUENT)

    optimizer, expected = build(model), build(straight)
    is_classified = optimizer.is_classified
    groups = [
        {**group, "params": [nn.Parameter(p.detach().clone()) for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group(group)
    assert optimizer.is_classified == is_classified
    for seed in range(4):
        gradients = [gaussian(*p.shape, seed=seed) for p in parameters_of(expected)]
        feed(optimizer, *gradients)
        feed(expected, *gradients)
    for ours, theirs in zip(parameters_of(optimizer), parameters_of(expected), strict=True):
        assert torch.equal(ours, theirs)
    assert [each["name"] for each in optimizer.stats()] == [e["name"] for e in expected.stats()]


def test_an_optimizer_that_is_dropped_drops_its_parameters():
    optimizer = optimizer_of(gaussian(8, 6), **FREQUENT)
    feed(optimizer, gaussian(8, 6))
    gone = weakref.ref(parameters_of(optimizer)[0])
    del optimizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    "change", [lambda params: params.pop(0), lambda params: params.append(params[0])]
)
def test_a_list_of_parameters_that_has_another_length_is_refused(change):
    optimizer = optimizer_of(gaussian(8, 6), gaussian(8, 6, seed=1), **FREQUENT)
    change(optimizer.param_groups[0]["params"])
    with pytest.raises(RuntimeError, match="parameter group of w0: it was built with 2 parameters"):
        optimizer.step()


def test_a_new_list_may_leave_out_what_is_frozen_but_not_reorder():
    optimizer = optimizer_of(gaussian(8, 6), gaussian(8, 6, seed=1), gaussian(8, 6, seed=2))
    first, second, third = parameters_of(optimizer)
    second.requires_grad_(False)
    optimizer.param_groups[0]["params"] = [first, third]
    feed(optimizer, gaussian(8, 6), gaussian(8, 6))
    assert [entry["name"] for entry in optimizer.stats()] == ["w0", "w2"]
    optimizer.param_groups[0]["params"] = [third, first]
    with pytest.raises(RuntimeError, match="w2: it is at the place of w0"):
        feed(optimizer, gaussian(8, 6), gaussian(8, 6))


def test_parameters_that_the_model_no_longer_has_are_named_after_a_few_steps():
    model = model_of()
    optimizer = optimizer_for(model)
    step(model, optimizer)
    model.load_state_dict(model_of(seed=1).state_dict(), assign=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)
        optimizer.zero_grad()
        step(model, optimizer)
    with pytest.warns(UserWarning, match="step: none of the optimizer's 4 parameters has had a"):
        step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)


def test_parameters_without_values_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))
    optimizer = optimizer_for(model)
    model.to_empty(device="cpu")
    with pytest.raises(
        ConfigError, match=r"0\.weight: is on the meta device.*build the optimizer after"
    ):
        step(model, optimizer)


def test_a_parametrization_added_later_trains_the_original():
    model = model_of()
    optimizer = optimizer_for(model)
    step(model, optimizer)
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    original = model[0].parametrizations.weight.original
    before = original.detach().clone()
    step(model, optimizer)
    assert not torch.equal(original, before)
    assert [entry["steps_since_refresh"] for entry in optimizer.stats()] == [2, 2]


def test_an_optimizer_with_state_is_not_renamed():
    optimizer = optimizer_of(gaussian(8, 6))
    feed(optimizer, gaussian(8, 6))
    optimizer.bind(anew=True)
    loaded = optimizer_of(gaussian(8, 6))
    loaded.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="only before the first step; pass a new optimizer"):
        loaded.adopt_names({"w0": "up"}, full_rank=[])


def test_an_expected_optimizer_is_known_by_its_parameters_until_it_steps(swapping):
    from arg_dist.engines.deepspeed_guard import _is_expected

    model, other = model_of(), model_of()
    optimizer = optimizer_for(model)
    assert all(map(_is_expected, model.parameters()))
    assert not any(map(_is_expected, other.parameters()))
    model.cpu()
    step(model, optimizer)
    assert not any(map(_is_expected, model.parameters()))
