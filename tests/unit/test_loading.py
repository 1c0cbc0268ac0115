"""What ``load_state_dict`` takes: this optimizer's state, or an error that says whose it is."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from matrices import gaussian
from one_process import feed, optimizer_of, parameters_of
from torch import nn

from arg_dist import AdaRankGrad, ConfigError

SHAPES = [(12, 9), (3, 8, 6), (7,)]
GRADIENTS = [[gaussian(*shape, seed=step) for shape in SHAPES] for step in range(6)]


def make(*, shapes: list[tuple[int, ...]] = SHAPES, steps: int = 0) -> AdaRankGrad:
    optimizer = optimizer_of(*(gaussian(*shape) for shape in shapes), lr=1e-2)
    for gradients in GRADIENTS[:steps]:
        feed(optimizer, *gradients)
    return optimizer


def saved() -> dict[str, Any]:
    return make(steps=3).state_dict()


def of(kind: Any, *, named: bool = True, **settings: Any) -> dict[str, Any]:
    """The state of another optimizer after a step, of parameters with these names."""
    parameters = [nn.Parameter(gaussian(*shape)) for shape in SHAPES]
    names = [(f"w{i}", parameter) for i, parameter in enumerate(parameters)]
    optimizer = kind(names if named else parameters, lr=1e-2, **settings)
    feed(optimizer, *GRADIENTS[0])
    found: dict[str, Any] = optimizer.state_dict()
    return found


def without(*keys: Any) -> dict[str, Any]:
    """Our state without what lies at the end of a path of keys."""
    changed = saved()
    inner: Any = changed
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return changed


def with_(value: Any, *keys: Any) -> dict[str, Any]:
    """Our state with `value` at the end of a path of keys."""
    changed = saved()
    inner: Any = changed
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return changed


def under_our_groups(kind: Any, **settings: Any) -> dict[str, Any]:
    return {**saved(), "state": of(kind, **settings)["state"]}


def galore() -> dict[str, Any]:
    """Groups as galore-torch's AdamW has them."""
    state = of(torch.optim.AdamW)
    for group in state["param_groups"]:
        group.update(rank=4, update_proj_gap=200, scale=0.25, proj_type="std")
    return state


REFUSED: dict[str, tuple[Any, str]] = {
    "AdamW's": (
        lambda: of(torch.optim.AdamW),
        r"got the state of another optimizer, such as AdamW \(entries exp_avg, exp_avg_sq, step\): "
        r"its parameter group 0 has amsgrad, betas.*no energy and max_rank; .*start afresh",
    ),
    "AdamW's, unnamed": (lambda: of(torch.optim.AdamW, named=False), "such as AdamW"),
    "SGD's": (lambda: of(torch.optim.SGD, momentum=0.9), "such as SGD"),
    "Adafactor's": (lambda: of(torch.optim.Adafactor), "another optimizer .entries col_var"),
    "GaLore's": (galore, "such as AdamW"),
    "AdamW's, fresh": (
        lambda: torch.optim.AdamW([("w0", nn.Parameter(gaussian(2)))]).state_dict(),
        "another optimizer: its parameter group 0",
    ),
    "AdamW's entries": (lambda: under_our_groups(torch.optim.AdamW), r"entry 0 .*has step, exp_av"),
    "SGD's entries": (lambda: under_our_groups(torch.optim.SGD, momentum=0.9), "another optimizer"),
    "nested entries": (
        lambda: with_({"block": {"L": torch.ones(2)}}, "state", 0),
        "entry 0 of the saved state has L for block",
    ),
    "an entry that is none": (lambda: with_(torch.ones(2), "state", 0), "entry 0 .* is a Tensor"),
    "a checkpoint": (lambda: {"model": {}, "optimizer": saved()}, "got model, optimizer; the dict"),
    "nothing": (dict, "got an empty dictionary"),
    "a list": (lambda: [saved()], "got <class 'list'>; the dictionary that state_dict"),
    "other names": (
        lambda: make_named("a", "b", "c").state_dict(),
        "parameter 'a' where the optimizer has 'w0'",
    ),
    "other shapes": (
        lambda: make(shapes=[(12, 8), (3, 8, 6), (7,)]).state_dict(),
        r"belongs to another model: w0 has the shape \(12, 9\), and had \(12, 8\)",
    ),
    "other groups": (
        lambda: AdaRankGrad(
            [{"params": [each]} for each in make_named("w0", "w1", "w2").named]
        ).state_dict(),
        r"saved parameter groups have \[1, 1, 1\] parameters, and the optimizer's have \[3\]",
    ),
    "fewer parameters": (lambda: make_named("w0", "w1").state_dict(), "None where the .*'w2'"),
    "emptied": (lambda: with_({}, "state"), "has taken 3 steps.* 5 .*that of 0 is in it"),
    "emptied, by an earlier version": (
        lambda: {k: v for k, v in with_({}, "state").items() if k != "units"},
        "has taken 3 steps, .*it was emptied",
    ),
    "one entry lost": (lambda: without("state", 1), "matrices and tensors, and that of 2 is in it"),
    "one matrix lost": (lambda: without("state", 1, "w1[2]"), "and that of 4 is in it"),
    "one entry too many": (lambda: with_({}, "state", 17), "has an entry 17, which is none of"),
    "a tensor lost": (lambda: without("state", 0, "w0", "exp_avg_sq"), "entry 0 .*basis"),
    "calls lost": (lambda: without("calls"), "has no calls, the steps taken: a tool"),
    "no learning rate": (lambda: without("param_groups", 0, "lr"), "parameter group 0 has no lr"),
    "a bad setting": (
        lambda: with_(-1.0, "param_groups", 0, "energy"),
        r"parameter group 0\.energy: .*got -1\.0",
    ),
}


def make_named(*names: str) -> Any:
    """An optimizer of parameters with these names, which are kept in `named`."""
    named = [
        (name, nn.Parameter(gaussian(*shape))) for name, shape in zip(names, SHAPES, strict=False)
    ]
    optimizer: Any = AdaRankGrad(named, max_rank=4, min_rank=1)
    optimizer.named = named
    return optimizer


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_ours_is_refused_before_anything_changes(case: str, steps: int) -> None:
    build, words = REFUSED[case]
    optimizer = make(steps=steps)
    before = copy.deepcopy(optimizer.state_dict())
    groups, states = optimizer.param_groups, optimizer.state
    with pytest.raises(ConfigError, match=rf"(?s)load_state_dict: .*{words}"):
        optimizer.load_state_dict(build())
    assert optimizer.param_groups is groups and optimizer.state is states
    assert str(optimizer.state_dict()) == str(before)
    feed(optimizer, *GRADIENTS[5])


def test_fresh_state_is_loaded_at_any_time() -> None:
    optimizer, fresh = make(steps=3), make().state_dict()
    assert fresh["state"] == {}
    optimizer.load_state_dict(fresh)
    assert optimizer.calls == 0 and not optimizer.state_bytes()
    feed(optimizer, *GRADIENTS[0])


def test_fresh_state_of_an_earlier_version_is_loaded() -> None:
    fresh = make().state_dict()
    for key in ("calls", "process", "units", "shapes"):
        del fresh[key]
    make().load_state_dict(fresh)


def test_state_of_an_earlier_version_is_loaded() -> None:
    earlier, optimizer = saved(), make()
    for key in ("units", "shapes"):
        del earlier[key]
    optimizer.load_state_dict(earlier)
    assert optimizer.calls == 3 and optimizer.state_bytes()


def test_steps_without_a_gradient_are_no_loss() -> None:
    optimizer, other = make(), make()
    feed(optimizer, *(torch.zeros(shape) for shape in SHAPES))
    other.load_state_dict(optimizer.state_dict())
    assert other.calls == 1
    frozen = make()
    for parameter in parameters_of(frozen):
        parameter.requires_grad_(False)
    frozen.step()
    other.load_state_dict(frozen.state_dict())


def test_state_that_was_loaded_is_saved_again() -> None:
    first, second = saved(), make()
    second.load_state_dict(copy.deepcopy(first))
    for parameter in parameters_of(second)[:2]:
        parameter.requires_grad_(False)
    again = second.state_dict()
    assert str(again["state"]) == str(first["state"])
    assert again["process"] == first["process"] and again["calls"] == first["calls"]


def test_state_of_another_process_is_not_saved_as_ones_own() -> None:
    optimizer = make(steps=1)
    optimizer.load_state_dict(with_((1, 2), "process"))
    with pytest.raises(RuntimeError, match=r"state_dict: .*loaded on process 0 of 1, but is of"):
        optimizer.state_dict()
    unbound = make()
    unbound.load_state_dict(with_((1, 2), "process"))
    assert unbound.state_dict()["process"] == (1, 2)


def test_hooks_see_what_is_loaded_and_may_change_it() -> None:
    optimizer, seen = make(), []

    def before(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append(sorted(state["state"]))
        state["calls"] = 7
        groups = [{**group, "lr": 0.5} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    def after(loaded: AdaRankGrad) -> None:
        seen.append(len([units for units in loaded.state.values() if units]))

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)
    given = saved()
    optimizer.load_state_dict(given)
    assert seen == [[0, 1, 2], 3]
    assert (optimizer.calls, optimizer.param_groups[0]["lr"], given["calls"]) == (7, 0.5, 3)


def test_names_that_a_tool_has_dropped_are_those_of_the_state() -> None:
    """As torchtitan 0.3 does, and as torch.optim takes them."""
    state = saved()
    for group in state["param_groups"]:
        del group["param_names"]
    loaded, whole = make(), make(steps=3)
    loaded.load_state_dict(state)
    assert loaded.param_groups[0]["param_names"] == whole.param_groups[0]["param_names"]
    for optimizer in (loaded, whole):
        for parameter in parameters_of(optimizer):
            parameter.data = torch.zeros_like(parameter)
        feed(optimizer, *GRADIENTS[3])
    for parameter, expected in zip(parameters_of(loaded), parameters_of(whole), strict=True):
        assert torch.equal(parameter, expected)


def test_a_state_without_anything_that_says_what_it_was_is_refused() -> None:
    """Where torchtitan 0.3 found nothing to load, as no state had been made to load it into."""
    state = saved()
    groups = [{k: v for k, v in g.items() if k != "param_names"} for g in state["param_groups"]]
    with pytest.raises(ConfigError, match=r"no state of any parameter: a tool that kept only"):
        make().load_state_dict({"state": {}, "param_groups": groups})


def test_the_state_of_other_parameters_is_told_by_its_names_where_groups_have_none() -> None:
    state = saved()
    for group in state["param_groups"]:
        del group["param_names"]
    entry = state["state"][0]
    (name,) = (key for key, unit in entry.items() if isinstance(unit, dict))
    entry["another"] = entry.pop(name)
    with pytest.raises(ConfigError, match=r"parameter 'another' where the optimizer has"):
        make().load_state_dict(state)


def test_groups_keep_what_others_have_put_there() -> None:
    state, optimizer = with_(0.3, "param_groups", 0, "initial_lr"), make()
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["initial_lr"] == 0.3
    state["param_groups"][0]["initial_lr"] = 0.1
    assert optimizer.param_groups[0]["initial_lr"] == 0.3


def test_lists_instead_of_tuples_are_taken_for_what_they_were() -> None:
    optimizer = make()
    optimizer.load_state_dict(with_([0.8, 0.9], "param_groups", 0, "betas"))
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("zeros", [torch.zeros(1).expand(108), torch.zeros(108)])
def test_placeholders_for_other_tools_are_not_taken_for_a_state(zeros: torch.Tensor) -> None:
    state, optimizer = saved(), make()
    for entry in state["state"].values():
        entry.update(step=3, exp_avg=zeros, exp_avg_sq=zeros)
    optimizer.load_state_dict(state)
    assert [list(units) for units in optimizer.state.values()] == [
        ["w0"],
        ["w1[0]", "w1[1]", "w1[2]"],
        ["w2"],
    ]


def test_the_message_names_the_remedy_once() -> None:
    with pytest.raises(ConfigError) as raised:
        make().load_state_dict(of(torch.optim.AdamW))
    assert len(re.findall("start afresh", str(raised.value))) == 1
