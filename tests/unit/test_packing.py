"""The packed form of a state: nothing changes on the way, and its size says nothing of its rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrices import changing_spectrum, gaussian
from one_process import feed, optimizer_of

from arg_dist import AdaRankGrad, ConfigError
from arg_dist.packing import DESCRIPTION_BYTES, FORM, pack, unpack
from arg_dist.parameter_groups import settings_of
from arg_dist.telemetry import storage_bytes

SHAPES = [(40, 30), (3, 8, 6), (5,), ()]
ALONE = (0, 1)


def trained(**settings: Any) -> AdaRankGrad:
    optimizer = optimizer_of(*(gaussian(*shape) for shape in SHAPES), lr=1e-2, **settings)
    for step in range(3):
        feed(optimizer, *(gaussian(*shape, seed=step) for shape in SHAPES))
    return optimizer


def packed(optimizer: AdaRankGrad) -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Each matrix and tensor, its state, and its packed form."""
    [plan], [group] = optimizer.bind(), optimizer.param_groups
    found = {}
    for unit in plan.units:
        state = optimizer.state[unit.fragment.target].get(unit.name, {})
        form = pack(unit, state, plan.communicator, settings_of(group), calls=3, units=6)
        found[unit.name] = (unit, state, form)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_rank": 0.9, "energy": 1.0, "residual": "scaled", "state_budget": "1MiB"},
        {"max_rank": 6, "side": "left"},
        {"low_rank": False},
    ],
)
def test_everything_comes_back_as_it_was(settings: dict[str, Any]) -> None:
    for name, (unit, state, form) in packed(trained(**settings)).items():
        calls, units, found = unpack(form, name, unit.fragment.parameter_shape, ALONE)
        assert (calls, units) == (3, 6) and state
        assert found.keys() == state.keys()
        for key, value in state.items():
            assert type(found[key]) is type(value)
            if isinstance(value, torch.Tensor):
                assert found[key].dtype == value.dtype and torch.equal(found[key], value)
            else:
                assert found[key] == value


def test_its_size_depends_on_the_settings_alone() -> None:
    sizes = []
    for energy, steps in ((0.1, 3), (0.99, 3), (0.5, 0)):
        optimizer = trained(energy=energy) if steps else optimizer_of(*map(zeros, SHAPES))
        sizes.append({n: sizes_of(form) for n, (_, _, form) in packed(optimizer).items()})
    assert sizes[0] == sizes[1] == sizes[2]


def zeros(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape)


def sizes_of(form: dict[str, torch.Tensor]) -> dict[str, int]:
    return {key: value.numel() for key, value in form.items()}


def test_it_is_little_larger_than_the_largest_state() -> None:
    for _, state, form in packed(trained(energy=1.0, max_rank=6)).values():
        [size] = [value.numel() for key, value in form.items() if key != FORM]
        assert storage_bytes([state]) <= size - DESCRIPTION_BYTES <= storage_bytes([state]) + 200


def one() -> tuple[Any, dict[str, torch.Tensor], str]:
    unit, _, form = packed(trained())["w0"]
    return unit, form, next(key for key in form if key != FORM)


@pytest.mark.parametrize(
    ("key", "place", "value", "words"),
    [
        (FORM, 0, 9, "w0 was packed in form 9, and this arg_dist reads 2"),
        (FORM, 1, 3, "no state of process 0 of 1 was saved, but of process 0 of 3 and the others"),
        (FORM, 2, 9, "has another size than when it was saved: .* another max_rank"),
        (None, 9, 0, "the state of w0 is damaged"),
        (None, 1, 0, "the state of w0 is damaged"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    key: str | None, place: int, value: int, words: str
) -> None:
    unit, form, data = one()
    form[key or data][place] = value
    with pytest.raises(ConfigError, match=rf"load_state_dict: .*{words}"):
        unpack(form, "w0", unit.fragment.parameter_shape, ALONE)


def test_another_shape_and_another_process_are_told() -> None:
    _, form, _ = one()
    with pytest.raises(ConfigError, match=r"of shape \(30, 40\), and was of one of \(40, 30\)"):
        unpack(form, "w0", (30, 40), ALONE)


def test_a_larger_rank_than_is_allowed_now_is_refused_when_saved() -> None:
    optimizer = optimizer_of(gaussian(40, 30), max_rank=8, min_rank=8)
    [gradient, *_] = changing_spectrum(40, 30, (0.9,), each=1)
    feed(optimizer, gradient)
    optimizer.param_groups[0].update(max_rank=2, min_rank=1)
    with pytest.raises(ConfigError, match=r"the state of w0 .*\(rank 8\).*for ranks up to 2; "):
        packed(optimizer)
