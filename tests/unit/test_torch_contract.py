"""What PyTorch's generic tests ask of every optimizer, in the form of those tests.

All that apply to an optimizer without foreach, fused, capturable and maximize; as in
``torch.testing._internal.common_optimizers`` they run over a list of inputs.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from typing import Any

import pytest
import torch
from matrices import gaussian
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from arg_dist import AdaRankGrad, ConfigError

INPUTS: dict[str, dict[str, Any]] = {
    "default": {},
    "non-default lr": {"lr": 0.01},
    "nonzero weight_decay": {"weight_decay": 0.1},
    "Tensor lr": {"lr": torch.tensor(0.001)},
    "Tensor lr and betas": {
        "lr": torch.tensor(0.001),
        "betas": (torch.tensor(0.9), torch.tensor(0.99)),
    },
    "full rank": {"low_rank": False},
    "preset": {"preset": "paper"},
    "no residual": {"residual": "none"},
    "frequent refreshes": {"min_gap": 2, "max_gap": 2},
}

every_input = pytest.mark.parametrize("kwargs", INPUTS.values(), ids=list(INPUTS))


def optimizer_of(*args: Any, **kwargs: Any) -> AdaRankGrad:
    """With settings of its own: a tensor would be shared by all tests."""
    return AdaRankGrad(*args, **copy.deepcopy(kwargs))


def problem(contiguous: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Weight, bias and input."""
    if contiguous:
        weight, bias = gaussian(10, 5), gaussian(10, seed=1)
    else:
        weight, bias = gaussian(10, 5, 2)[..., 0], gaussian(10, 2, seed=1)[..., 0]
    return nn.Parameter(weight.to(dtype)), nn.Parameter(bias.to(dtype)), gaussian(5).to(dtype)


def closure_of(optimizer: Any, weight: Tensor, bias: Tensor, given: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = (weight.mv(given) + bias).pow(2).sum()
    loss.backward()
    return loss


def same(one: Any, other: Any) -> bool:
    """Whether two state dictionaries are equal, tensors to the bit."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def trained(steps: int = 3, **kwargs: Any) -> tuple[AdaRankGrad, list[nn.Parameter]]:
    weight, bias, given = problem()
    optimizer = optimizer_of([weight, bias], **kwargs)
    for _ in range(steps):
        optimizer.step(functools.partial(closure_of, optimizer, weight, bias, given))
    return optimizer, [weight, bias]


# -- errors and arguments --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "kwargs", "error", "words"),
    [
        (nn.Parameter(torch.randn(2)), {}, TypeError, "should be an iterable of Tensors or dicts"),
        ([torch.randn(2, requires_grad=True) * 2], {}, ValueError, "non-leaf"),
        (["not a tensor"], {}, TypeError, "only optimize Tensors"),
        ([], {}, ValueError, "empty parameter list"),
        ([nn.Parameter(torch.randn(2))], {"lr": -1e-2}, ConfigError, "lr"),
        ([nn.Parameter(torch.randn(2))], {"eps": -1}, ConfigError, "eps"),
        ([nn.Parameter(torch.randn(2))], {"betas": (1.0, 0.9)}, ConfigError, "betas"),
        ([nn.Parameter(torch.randn(2))], {"weight_decay": -1}, ConfigError, "weight_decay"),
        ([nn.Parameter(torch.randn(2))], {"lr": torch.tensor([1e-3, 1e-2])}, ConfigError, "lr"),
    ],
)
def test_optimizer_errors(params, kwargs, error, words):
    with pytest.raises(error, match=words):
        AdaRankGrad(params, **kwargs)


def test_duplicate_params_are_told():
    weight = nn.Parameter(torch.randn(5, 5))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        AdaRankGrad([weight, weight])
    with pytest.raises(ValueError, match="more than one parameter group"):
        AdaRankGrad([{"params": [weight]}, {"params": [weight]}])


def test_params_may_be_a_generator_and_a_group_may_hold_one_tensor():
    model = nn.Linear(5, 10)
    assert len(AdaRankGrad(model.parameters()).param_groups[0]["params"]) == 2
    single = AdaRankGrad([{"params": model.weight}, {"params": model.bias, "lr": 0.5}])
    assert [len(group["params"]) for group in single.param_groups] == [1, 1]


def test_optimizer_with_named_parameters():
    model = nn.Sequential(nn.Linear(5, 10), nn.Linear(10, 5))
    optimizer = AdaRankGrad(model.named_parameters())
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names


@every_input
def test_optimizer_can_be_printed(kwargs):
    assert "AdaRankGrad" in repr(optimizer_of([nn.Parameter(torch.randn(2, 3))], **kwargs))


# -- direction -------------------------------------------------------------------------------------


@every_input
@pytest.mark.parametrize("contiguous", [True, False])
def test_forloop_goes_right_direction(kwargs, contiguous):
    weight, bias, given = problem(contiguous)
    optimizer = optimizer_of([weight, bias], **kwargs)
    closure = functools.partial(closure_of, optimizer, weight, bias, given)
    initial = closure().item()
    for _ in range(20):
        optimizer.step(closure)
    assert closure().item() < initial


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, gamma=0.9, step_size=10),
    "linear": lambda o: lr_scheduler.LinearLR(o, start_factor=0.4, total_iters=4),
    "plateau": lr_scheduler.ReduceLROnPlateau,
    "cosine restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=40),
    "two in sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[5]
    ),
}


@every_input
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=list(SCHEDULERS))
def test_param_group_with_lrscheduler_goes_right_direction(kwargs, make):
    weight, bias, given = problem()
    groups = [{"params": [weight]}, {"params": [bias], "lr": torch.tensor(0.01)}]
    optimizer = optimizer_of(groups, **kwargs)
    scheduler = make(optimizer)
    closure = functools.partial(closure_of, optimizer, weight, bias, given)
    initial = closure().item()
    for _ in range(20):
        loss = optimizer.step(closure)
        scheduler.step(*([loss] if "Plateau" in type(scheduler).__name__ else []))
    assert closure().item() < initial


@pytest.mark.parametrize("setting", ["lr", "weight_decay"])
@every_input
def test_param_groups(kwargs, setting):
    weight, bias, given = problem()
    kwargs = {**kwargs, setting: 0.0} if setting == "lr" else {**kwargs, "lr": 0.01}
    optimizer = optimizer_of([{"params": [weight]}, {"params": [bias], setting: 0.1}], **kwargs)
    before = [weight.detach().clone(), bias.detach().clone()]
    optimizer.step(functools.partial(closure_of, optimizer, weight, bias, given))
    assert not torch.equal(bias, before[1])
    assert torch.equal(weight, before[0]) == (setting == "lr")


@every_input
@pytest.mark.parametrize("dimensions", [0, 1])
def test_tensor_lr(kwargs, dimensions):
    kwargs = {key: value for key, value in kwargs.items() if key != "lr"}
    number = torch.tensor(0.01).item()
    _, expected = trained(5, lr=number, **kwargs)
    lr = torch.full((1,) * dimensions, 0.01)
    optimizer, actual = trained(5, lr=lr, **kwargs)
    assert all(map(torch.equal, actual, expected))
    assert torch.is_tensor(optimizer.param_groups[0]["lr"])


@every_input
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex(kwargs, dtype):
    real = torch.float64 if dtype == torch.complex128 else torch.float32
    start = [gaussian(10, 5, 2, seed=i).to(real) for i in range(3)]
    ours = [nn.Parameter(torch.view_as_complex(each.clone())) for each in start]
    theirs = [nn.Parameter(each.clone()) for each in start]
    optimizers = optimizer_of(ours, **kwargs), optimizer_of(theirs, **{**kwargs, "low_rank": False})
    for step in range(3):
        for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            their.grad = gaussian(10, 5, 2, seed=10 * step + i + 5).to(real)
            our.grad = torch.view_as_complex(their.grad)
        for optimizer in optimizers:
            optimizer.step()
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(torch.view_as_real(our.detach()), their.detach())


@every_input
def test_complex_2d(kwargs):
    both = gaussian(2, 2)
    one = nn.Parameter(torch.view_as_complex(both.clone()))
    two = [nn.Parameter(both[:, i].clone()) for i in (0, 1)]
    first, second = optimizer_of([one], **kwargs), optimizer_of(two, **kwargs)
    for _ in range(10):
        for optimizer, (x, y) in ((first, one), (second, torch.complex(*two))):
            optimizer.zero_grad()
            ((1 - x) ** 2 + 100 * (y - x**2) ** 2).abs().backward()
        first.step()
        second.step()
        torch.testing.assert_close(one.detach(), torch.complex(*two).detach())


@pytest.mark.parametrize("low_rank", [True, False])
def test_mixed_dtypes(low_rank):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]
    weights = [nn.Parameter(gaussian(9, 6).to(dtype)) for dtype in dtypes]
    optimizer = AdaRankGrad(weights, lr=0.05, low_rank=low_rank)
    for _ in range(3):
        for weight in weights:
            weight.grad = gaussian(9, 6, seed=1).to(weight.dtype)
        optimizer.step()
    assert [weight.dtype for weight in weights] == dtypes
    assert not any(torch.equal(weight, gaussian(9, 6).to(weight.dtype)) for weight in weights)
    for near in weights[1:4]:
        torch.testing.assert_close(near.double(), weights[0], atol=2e-2, rtol=1e-2)


# -- no gradients ----------------------------------------------------------------------------------


@every_input
def test_step_is_noop_when_params_have_no_grad(kwargs):
    weight, bias, _ = problem()
    optimizer = optimizer_of([weight, bias], **kwargs)
    before = [weight.detach().clone(), bias.detach().clone()]
    optimizer.step()
    assert torch.equal(weight, before[0]) and torch.equal(bias, before[1])


@every_input
def test_step_is_noop_for_zero_grads(kwargs):
    weight = nn.Parameter(gaussian(10, 5))
    optimizer = optimizer_of([weight], **{**kwargs, "weight_decay": 0.0})
    for _ in range(2):
        weight.grad = torch.zeros(10, 5)
        optimizer.step()
    assert torch.equal(weight, gaussian(10, 5))


@every_input
def test_empty_grad(kwargs):
    embedding = nn.Embedding(5, 1, padding_idx=0)
    empty = nn.Parameter(torch.empty(0, 3))
    empty.grad = torch.empty(0, 3)
    optimizer = optimizer_of([*embedding.parameters(), empty], **kwargs)
    embedding(torch.zeros(1, dtype=torch.long)).sum().backward()
    optimizer.step()


@every_input
def test_grads_are_never_inplaced_into(kwargs):
    optimizer, params = trained(0, **kwargs)
    for step in range(3):
        for i, param in enumerate(params):
            param.grad = gaussian(*param.shape, seed=10 * step + i)
        versions = [param.grad._version for param in params]
        copies = [param.grad.clone() for param in params]
        optimizer.step()
        assert [param.grad._version for param in params] == versions
        assert all(torch.equal(p.grad, c) for p, c in zip(params, copies, strict=True))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    optimizer, params = trained(1)
    optimizer.zero_grad(set_to_none=set_to_none)
    for param in params:
        assert param.grad is None if set_to_none else not param.grad.any()


def test_step_returns_the_loss_and_the_closure_runs_with_gradients():
    optimizer, params = trained(0)
    with torch.no_grad():
        loss = optimizer.step(functools.partial(closure_of, optimizer, *params, gaussian(5)))
    assert loss.requires_grad and optimizer.step() is None


# -- state -----------------------------------------------------------------------------------------


@every_input
def test_non_empty_state(kwargs):
    optimizer, params = trained(1, **kwargs)
    assert set(optimizer.state) == set(params)
    for state in optimizer.state.values():
        assert len(state) > 0
    assert optimizer.state_dict()["state"].keys() == {0, 1}


@every_input
@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("contiguous", [True, False])
def test_state_dict_deterministic(kwargs, names, contiguous):
    weight, bias, given = problem(contiguous)
    params = [("weight", weight), ("bias", bias)] if names else [weight, bias]
    optimizer = optimizer_of(params, **kwargs)
    closure = functools.partial(closure_of, optimizer, weight, bias, given)
    for _ in range(3):
        optimizer.step(closure)
    weight_c, bias_c, _ = problem(contiguous)
    weight_c.data.copy_(weight)
    bias_c.data.copy_(bias)
    params = [("weight", weight_c), ("bias", bias_c)] if names else [weight_c, bias_c]
    optimizer_c = optimizer_of(params, **kwargs)
    saved, kept = optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())
    optimizer_c.load_state_dict(copy.deepcopy(saved))
    closure_c = functools.partial(closure_of, optimizer_c, weight_c, bias_c, given)
    assert same(saved, kept)  # loading has not changed it
    for _ in range(5):
        optimizer.step(closure)
        optimizer_c.step(closure_c)
        assert torch.equal(weight, weight_c) and torch.equal(bias, bias_c)
    assert same(optimizer.state_dict(), optimizer_c.state_dict())


@every_input
@pytest.mark.parametrize("weights_only", [True, False])
def test_save_load_equality(kwargs, weights_only):
    optimizer, _ = trained(3, **kwargs)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=weights_only)
    assert same(loaded, optimizer.state_dict())


@every_input
def test_state_dict_can_be_pickled(kwargs):
    optimizer, _ = trained(1, **kwargs)
    copied = pickle.loads(pickle.dumps(optimizer.state_dict()))
    assert same(copied, optimizer.state_dict())


def test_load_state_dict_does_not_share_memory():
    first, _ = trained(2)
    second, _ = trained(0)
    saved = first.state_dict()
    second.load_state_dict(saved)
    theirs = {id(t) for state in saved["state"].values() for t in tensors_of(state)}
    assert not theirs & {id(t) for state in second.state.values() for t in tensors_of(state)}


def tensors_of(state: dict[str, Any]) -> list[Tensor]:
    return [value for unit in state.values() for value in unit.values() if torch.is_tensor(value)]


def test_load_state_dict_of_other_groups_is_an_error():
    first, _ = trained(1)
    model = nn.Linear(5, 10)
    for groups in ([model.weight], [{"params": [model.weight]}, {"params": [model.bias]}]):
        with pytest.raises((ValueError, ConfigError)):
            AdaRankGrad(groups).load_state_dict(first.state_dict())


# -- hooks -----------------------------------------------------------------------------------------


def test_step_pre_and_post_hooks():
    seen: list[str] = []
    optimizer, params = trained(0)

    def hook(name: str, opt: Any, args: Any, kwargs: Any) -> None:
        assert opt is optimizer
        seen.append(name)

    handles = [
        register_optimizer_step_pre_hook(functools.partial(hook, "global pre")),
        register_optimizer_step_post_hook(functools.partial(hook, "global post")),
        optimizer.register_step_pre_hook(functools.partial(hook, "pre")),
        optimizer.register_step_post_hook(functools.partial(hook, "post")),
    ]
    optimizer.step(functools.partial(closure_of, optimizer, *params, gaussian(5)))
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert [name for name in seen if "global" in name] == ["global pre", "global post"]
    assert seen.index("pre") < seen.index("post") and len(seen) == 4


def test_a_pre_hook_may_change_the_arguments():
    optimizer, params = trained(0)
    closure = functools.partial(closure_of, optimizer, *params, gaussian(5))
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, closure), {}))
    before = params[0].detach().clone()
    optimizer.step()
    assert not torch.equal(params[0], before)


def test_state_dict_hooks():
    optimizer, _ = trained(1)
    optimizer.register_state_dict_pre_hook(
        lambda opt: opt.param_groups[0].update(name="of the hook")
    )
    optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "more": 1})
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["name"] == "of the hook"
    assert "state" in saved


@pytest.mark.parametrize("prepend", [False, True])
def test_load_state_dict_hooks(prepend):
    first, _ = trained(1)
    second, _ = trained(0)
    order: list[str] = []

    def pre(name: str, opt: Any, saved: dict[str, Any]) -> dict[str, Any]:
        order.append(name)
        saved["param_groups"][0]["lr"] = 0.125 if name == "first" else 0.25
        return saved

    second.register_load_state_dict_pre_hook(functools.partial(pre, "first"))
    second.register_load_state_dict_pre_hook(functools.partial(pre, "second"), prepend=prepend)
    second.register_load_state_dict_post_hook(lambda opt: order.append("post"))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert order == (["second", "first"] if prepend else ["first", "second"]) + ["post"]
    assert second.param_groups[0]["lr"] == (0.125 if prepend else 0.25)


# -- defaults --------------------------------------------------------------------------------------


@every_input
def test_defaults_reach_groups_that_do_not_override_them(kwargs):
    weight, bias, _ = problem()
    optimizer = optimizer_of([{"params": [weight], "eps": 1e-3}, {"params": [bias]}], **kwargs)
    first, second = optimizer.param_groups
    assert (first["eps"], second["eps"]) == (1e-3, optimizer.defaults["eps"])
    for key, value in optimizer.defaults.items():
        assert second[key] is value or second[key] == value
    for key in kwargs:
        assert optimizer.defaults[key] == kwargs[key]


def test_add_param_group_takes_the_defaults():
    optimizer, _ = trained(1, lr=0.5)
    optimizer.add_param_group({"params": nn.Parameter(torch.randn(3, 4))})
    assert optimizer.param_groups[1]["lr"] == 0.5
    with pytest.raises(TypeError, match="set"):
        optimizer.add_param_group({"params": {nn.Parameter(torch.randn(3))}})


def test_profiled_steps_carry_the_name_of_the_class():
    optimizer, params = trained(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step(functools.partial(closure_of, optimizer, *params, gaussian(5)))
    assert any("Optimizer.step#AdaRankGrad.step" in event.key for event in profile.key_averages())
