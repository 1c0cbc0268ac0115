"""State in fewer bits: what rounding costs, that it is right on average, what reads it again."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import changing_spectrum, gaussian
from one_process import feed, optimizer_of, parameters_of, train
from tolerances import RANDOM_ROUNDING, RANDOM_STEPS

import arg_dist
from arg_dist.algorithm import keep, read
from arg_dist.subspace import compact
from arg_dist.subspace.compact import POWERS, decode, encode
from arg_dist.subspace.rounding import to_bf16
from arg_dist.telemetry import storage_bytes

pytestmark = pytest.mark.unit

kinds = st.sampled_from(["basis", "exp_avg", "exp_avg_sq"])
FEW_BITS = {"state_dtype": "int8", "full_rank_state": "int8"}
SETTINGS = {"max_rank": 6, "min_gap": 3, "max_gap": 4, "hysteresis": 0.0, "lr": 1e-2, "energy": 0.9}


@st.composite
def numbers(draw, key):
    """``rows x width`` of very different sizes, or ``elements``."""
    shape = draw(st.tuples(st.integers(0, 7), st.integers(1, 40)) | st.tuples(st.integers(0, 700)))
    values = gaussian(*shape, seed=draw(st.integers(0, 99)))
    values = values * torch.logspace(0, -draw(st.integers(0, 6)), shape[-1] or 1)[: shape[-1]]
    return values.square() if key == "exp_avg_sq" else values


@given(st.data(), kinds)
def test_numbers_lose_little_and_what_was_decoded_keeps_its_codes(data, key):
    values = data.draw(numbers(key))
    codes, scales = encode(values, key, 1)
    found = decode(codes, scales, POWERS[key])
    assert found.shape == values.shape and codes.dtype.itemsize == 1
    again, same_scales = encode(found, key, 2)
    assert torch.equal(codes, again) and torch.equal(scales, same_scales)
    # one step of codes, where they lie farthest apart: at the scale
    of_each = scales[:, None] if values.dim() == 2 else scales.repeat_interleave(256)[: len(values)]
    step = POWERS[key] / (255 if key == "exp_avg_sq" else 127)
    assert ((found - values).abs() <= step * of_each).all()
    assert torch.equal(found == 0, values == 0) or key != "exp_avg_sq"


@given(st.data(), kinds, st.integers(1, 6))
def test_rows_are_rounded_alike_however_a_matrix_is_cut(data, key, at):
    values = gaussian(7, 12, seed=data.draw(st.integers(0, 99)))
    values = values.square() if key == "exp_avg_sq" else values
    whole = encode(values, key, 5)
    parts = [encode(part, key, 5) for part in (values[:at], values[at:])]
    for together, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(together, torch.cat(pieces))
    in_parts = [to_bf16(part, 5) for part in (values[:at], values[at:])]
    assert torch.equal(to_bf16(values, 5), torch.cat(in_parts))
    rounded = to_bf16(values, 5).float()
    assert torch.equal(to_bf16(rounded, 6).float(), rounded)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_an_average_follows_what_it_averages(key, precision):
    """Rounded to the nearest, it would stay where it began."""
    decay, state, exact = 0.999, {}, torch.ones(64, 128)
    keep(state, key, exact.clone(), precision)
    for step in range(2000):
        news = 0.1 * gaussian(64, 128, seed=step).square() * torch.logspace(0, -2, 128)
        exact = exact.lerp(news, 1 - decay)
        keep(state, key, read(state, key).lerp(news, 1 - decay), precision, step=step)
    RANDOM_ROUNDING.check((read(state, key) / exact).mean(), 1.0)
    assert (read(state, key) / exact).std() < 0.15


def test_zeros_and_second_moments_too_small_for_a_code():
    row = torch.tensor([[0.0, 1e-30, 1.0], [0.0, 0.0, 0.0]])
    codes, scales = encode(row, "exp_avg_sq", 1)
    assert codes.tolist() == [[0, 1, 255], [0, 0, 0]] and scales.tolist() == [1.0, 0.0]
    assert torch.equal(decode(codes, scales, 4)[1], row[1])


# -- optimizers -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch):
    monkeypatch.setattr(compact, "SMALLEST", 8)
    monkeypatch.setattr(compact, "PIECE", 512)


def make(**settings):
    weights = [gaussian(12, 9), gaussian(9, 12, seed=1), gaussian(1300, seed=2), gaussian(5)]
    return optimizer_of(*weights, **{**SETTINGS, **FEW_BITS, **settings})


GRADIENTS = [
    [tall, wide, gaussian(1300, seed=step), gaussian(5, seed=step)]
    for step, (tall, wide) in enumerate(
        zip(*(changing_spectrum(*s, (0.4, 0.9), each=10) for s in ((12, 9), (9, 12))), strict=True)
    )
]


def states(optimizer):
    return {name: state for units in optimizer.state.values() for name, state in units.items()}


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_state_is_as_large_as_is_reckoned(precision):
    optimizer = make(state_dtype=precision, full_rank_state=precision)
    train(optimizer, GRADIENTS[:5])
    rank = states(optimizer)["w0"]["rank"]
    matrix = (9 + 2 * 12) * compact.row_bytes(rank, precision) + 8
    held = [storage_bytes([state]) for state in states(optimizer).values()]
    assert held[0] == matrix
    assert held[2] == 2 * compact.tensor_bytes(1300, precision)
    assert held[3] == 2 * 4 * 5
    wide = optimizer_of(*parameters_of(optimizer), **SETTINGS)
    train(wide, GRADIENTS[:5])
    share = compact.NUMBER_BYTES[precision] / 4
    assert share < optimizer.state_bytes() / wide.state_bytes() < share + 0.15


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_training_in_few_bits_goes_where_training_in_fp32_goes(precision):
    few, exact = (make(state_dtype=p, full_rank_state=p) for p in (precision, "fp32"))
    start = [each.detach().clone() for each in parameters_of(exact)]
    ends = train(few, GRADIENTS), train(exact, GRADIENTS)
    for one, other, begin in zip(*ends, start, strict=True):
        assert (one - other).norm() < 0.1 * (other - begin).norm()


def test_a_run_that_was_saved_and_loaded_goes_on_to_the_bit(tmp_path):
    straight, first = make(), make()
    expected = train(straight, GRADIENTS)
    weights = train(first, GRADIENTS[:7])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    arg_dist.checkpoint.save(tmp_path / "saved", first, step=7)
    for by_file in (True, False):
        second = make(lr=0.5)
        for parameter, weight in zip(parameters_of(second), weights, strict=True):
            parameter.data.copy_(weight)
        if by_file:
            file.seek(0)
            second.load_state_dict(torch.load(file, weights_only=True))
        else:
            arg_dist.checkpoint.load(tmp_path / "saved", second)
        for actual, wanted in zip(train(second, GRADIENTS[7:]), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_a_run_may_go_on_in_another_precision():
    first = make()
    train(first, GRADIENTS[:7])
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        second = make()
        second.load_state_dict(first.state_dict())
        for group in second.param_groups:
            group["state_dtype"] = group["full_rank_state"] = precision
        train(second, GRADIENTS[7:8])
        for name in ("w0", "w2"):
            state = states(second)[name]
            assert {state[k].dtype for k in POWERS.keys() & state.keys()} == {dtype}
            assert not [key for key in state if key.endswith("_scales")]


def test_parameters_in_fp64_keep_it():
    optimizer = optimizer_of(gaussian(1300).double(), low_rank=False, **FEW_BITS)
    feed(optimizer, gaussian(1300, seed=1).double())
    assert states(optimizer)["w0"]["exp_avg"].dtype == torch.float64


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_rank", [True, False])
def test_small_steps_of_bf16_weights_are_kept_on_average(low_rank):
    settings = {"lr": 1e-4, "low_rank": low_rank, "scale": 1.0}
    start = (1.5 + 0.1 * gaussian(96, 96)).bfloat16()
    moved = {}
    for name, weight, rounding in (
        ("exact", start.float(), "nearest"),
        ("nearest", start, "nearest"),
        ("random", start, "random"),
    ):
        optimizer = optimizer_of(weight, weight_rounding=rounding, **settings)
        for step in range(30):
            feed(optimizer, 1 + 0.5 * gaussian(96, 96, seed=step))
        [weight] = parameters_of(optimizer)
        moved[name] = float((start.double() - weight.detach().double()).mean())
    assert moved["nearest"] < 0.1 * moved["exact"]
    RANDOM_STEPS.check(moved["random"] / moved["exact"], 1.0)
