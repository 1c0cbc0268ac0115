"""Optimizer state: what it holds, how large it is, and that saving it loses nothing."""

from __future__ import annotations

import io

import pytest
import torch
from matrices import changing_spectrum, gaussian
from one_process import feed, optimizer_of, parameters_of, train

from arg_dist import ConfigError

SETTINGS = {
    "max_rank": 5,
    "energy": 0.95,
    "hysteresis": 0.0,
    "min_gap": 3,
    "max_gap": 4,
    "lr": 1e-2,
}
SHAPES = [(12, 9), (9, 12), (4, 7, 8), (6,)]
GRADIENTS = [
    [tall, wide, gaussian(4, 7, 8, seed=step), gaussian(6, seed=step)]
    for step, (tall, wide) in enumerate(
        zip(*(changing_spectrum(*shape, (0.4, 0.9), each=10) for shape in SHAPES[:2]), strict=True)
    )
]


def make(dtype: torch.dtype = torch.float32, **settings):
    weights = [gaussian(*shape).to(dtype) for shape in SHAPES]
    return optimizer_of(*weights, **{**SETTINGS, **settings})


def states(optimizer) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for parameter in parameters_of(optimizer):
        found.update(optimizer.state[parameter])
    return found


def tensors(optimizer) -> list[torch.Tensor]:
    return [
        value
        for state in states(optimizer).values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]


@pytest.mark.parametrize(("shape", "basis", "moment"), [((12, 9), 9, 12), ((9, 12), 9, 12)])
def test_the_basis_lies_on_the_shorter_side_the_moments_on_the_other(shape, basis, moment):
    optimizer = optimizer_of(gaussian(*shape), **SETTINGS)
    train(optimizer, [[gaussian(*shape)]])
    state = states(optimizer)["w0"]
    rank = state["rank"]
    assert state["basis"].shape == (basis, rank)
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (moment, rank)


def test_each_matrix_of_a_stack_has_a_state_of_its_own():
    optimizer = make()
    train(optimizer, GRADIENTS[:1])
    assert list(states(optimizer)) == ["w0", "w1", *(f"w2[{i}]" for i in range(4)), "w3"]


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_no_view_keeps_a_larger_tensor_alive(steps):
    optimizer = make()
    train(optimizer, GRADIENTS[:steps])
    held = tensors(optimizer)
    for tensor in held:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert optimizer.state_bytes() == sum(tensor.nbytes for tensor in held)


def test_state_is_smaller_than_adams():
    weight = gaussian(64, 48)
    ours, remembering = (
        optimizer_of(weight, max_rank=6, energy=1.0, residual_momentum=decay)
        for decay in (0.0, 0.9)
    )
    for optimizer in (ours, remembering):
        train(optimizer, [[gaussian(64, 48, seed=1)]])
    assert ours.state_bytes() == 4 * 6 * (48 + 64 + 64) + 8
    assert ours.state_bytes() < 0.2 * 2 * weight.nbytes
    # 4 bits an element, and a scale of 16 bits for 256 elements
    assert remembering.state_bytes() == ours.state_bytes() + 64 * 48 * (4 + 16 / 256) / 8


def test_state_shrinks_with_the_rank():
    optimizer = optimizer_of(gaussian(12, 9), **{**SETTINGS, "min_gap": 1, "max_gap": 1})
    sizes = []
    for gradient in changing_spectrum(12, 9, (0.9, 0.3), each=1):
        feed(optimizer, gradient)
        sizes.append(optimizer.state_bytes())
    assert sizes[1] < sizes[0]


def test_everything_in_the_state_is_a_tensor_or_a_plain_number():
    optimizer = make()
    train(optimizer, GRADIENTS[:6])
    for state in states(optimizer).values():
        assert {type(value) for value in state.values()} <= {torch.Tensor, int, float}


def through_a_file(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved_after", [3, 11])
def test_a_run_that_was_saved_and_loaded_goes_on_to_the_bit(dtype, saved_after):
    straight, first, second = make(dtype), make(dtype), make(dtype, lr=0.5)
    weights = train(first, GRADIENTS[:saved_after])
    for parameter, weight in zip(parameters_of(second), weights, strict=True):
        parameter.data.copy_(weight)
    second.load_state_dict(through_a_file(first.state_dict()))
    for actual, expected in zip(
        train(second, GRADIENTS[saved_after:]), train(straight, GRADIENTS), strict=True
    ):
        assert torch.equal(actual, expected)


def test_loading_keeps_types_and_copies_tensors():
    first, second = make(torch.bfloat16), make(torch.bfloat16)
    train(first, GRADIENTS[:6])
    second.load_state_dict(first.state_dict())
    for name, state in states(first).items():
        for key, value in state.items():
            loaded = states(second)[name][key]
            assert type(loaded) is type(value)
            if isinstance(value, torch.Tensor):
                assert loaded.dtype == value.dtype and torch.equal(loaded, value)
                assert loaded.data_ptr() != value.data_ptr()


def test_settings_are_saved_with_the_groups():
    first, second = make(max_rank=5, lr=0.25), make(max_rank=2, min_rank=2)
    second.load_state_dict(first.state_dict())
    assert (second.param_groups[0]["max_rank"], second.param_groups[0]["lr"]) == (5, 0.25)


def test_state_for_other_names_is_refused():
    saved = optimizer_of(gaussian(8, 6)).state_dict()
    saved["param_groups"][0]["param_names"] = ["module.w0"]
    with pytest.raises(ConfigError, match=r"load_state_dict: .*'module\.w0'.*'w0'"):
        optimizer_of(gaussian(8, 6)).load_state_dict(saved)


def test_a_setting_that_is_newer_than_the_state_keeps_its_value():
    first, second = make(), make(collective_timeout=77.0)
    train(first, GRADIENTS[:3])
    saved = first.state_dict()
    for group in saved["param_groups"]:
        del group["collective_timeout"]
    second.load_state_dict(saved)
    train(second, GRADIENTS[3:5])
    assert second.param_groups[0]["collective_timeout"] == 77.0
