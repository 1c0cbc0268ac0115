"""Momentum of the residual: its codes, and the step that uses it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import arg_dist
from arg_dist.subspace.codes import BLOCK, STEPS, Coded, coded_bytes, coded_zeros, decode, encode
from arg_dist.subspace.residual import polar_factor
from tests.matrices import gaussian
from tests.tolerances import ROUNDING

DECAY = 0.9
sizes = st.integers(1, 3 * BLOCK + 5)
widths = st.sampled_from([2, 4])


def root_mean_squares(values: torch.Tensor) -> torch.Tensor:
    """Of each block, repeated for each of its elements."""
    means = [block.square().mean().sqrt().expand(len(block)) for block in values.split(BLOCK)]
    return torch.cat(means)


@given(sizes, st.integers(-30, 30), widths)
def test_an_element_becomes_the_nearest_level(size, exponent, bits):
    values = gaussian(size, 1, seed=size).view(-1) * 2.0**exponent
    coded = encode(values.clone(), bits)
    assert coded.bits == bits
    assert coded.codes.nbytes + coded.scales.nbytes == coded_bytes(size, bits)
    assert coded.codes.dtype == torch.uint8 and coded.scales.dtype == torch.bfloat16
    found = decode(coded, size)
    step = coded.scales.float().repeat_interleave(BLOCK)[:size]
    torch.testing.assert_close(step, STEPS[bits] * root_mean_squares(values), rtol=2**-8, atol=0)
    inside = values.abs() < 2 ** (bits - 1) * step
    assert bool(((found - values).abs() <= step / 2 * 1.0001)[inside].all())
    assert torch.equal(found.sign(), torch.where(values >= 0, 1.0, -1.0))
    assert torch.equal(found[~inside].abs(), ((2 ** (bits - 1) - 0.5) * step)[~inside])


@pytest.mark.parametrize(("bits", "most"), [(4, 0.0125), (2, 0.121)])
def test_what_a_gaussian_loses(bits, most):
    values = gaussian(1000 * BLOCK, 1, seed=0).view(-1)
    lost = decode(encode(values.clone(), bits), len(values)) - values
    assert lost.square().sum() / values.square().sum() < most  # 1.15 % and 11.9 %, and bf16's


@given(sizes, widths)
def test_zeros_stay_zeros(size, bits):
    for coded in (encode(torch.zeros(size), bits), coded_zeros(size, bits, torch.device("cpu"))):
        assert not decode(coded, size).any()
        assert len(coded.scales) == -(-size // BLOCK)


def test_a_block_of_zeros_beside_others():
    values = torch.cat((torch.zeros(BLOCK), torch.ones(BLOCK)))
    found = decode(encode(values.clone(), 4), 2 * BLOCK)
    assert not found[:BLOCK].any() and found[BLOCK:].all()


def training(shape, **settings):
    weight = torch.nn.Parameter(torch.zeros(shape))
    chosen = {"lr": 0.1, "scale": 1.0, "residual_momentum": DECAY, "max_rank": 2, "min_rank": 2}
    optimizer = arg_dist.AdaRankGrad(
        [("matrix", weight)], process_group=None, **{**chosen, **settings}
    )
    return weight, optimizer


@pytest.mark.parametrize("shape", [(24, 10), (10, 24)])
def test_steps_follow_the_formula(shape):
    weight, optimizer = training(shape)
    R, reach, M, V = torch.zeros(shape), 0.0, 0.0, 0.0
    for number in range(1, 6):
        before = weight.detach().clone()
        G = weight.grad = gaussian(*shape, seed=number)
        optimizer.step()
        [state] = optimizer.state[weight].values()
        Q, is_right, norm = state["basis"], shape[0] >= shape[1], float(G.norm())

        def outside(of: torch.Tensor, Q=Q, is_right=is_right) -> torch.Tensor:
            return of - (of @ Q @ Q.T if is_right else Q @ (Q.T @ of))

        R = DECAY * R + (1 - DECAY) * outside(G)
        reach = DECAY * reach + (1 - DECAY) * norm
        X = outside((1 - DECAY) * outside(G) + DECAY * R) / ((1 - DECAY) * norm + DECAY * reach)
        X /= (shape[0] * X.square().sum(1, keepdim=True) + 1e-4).sqrt()
        P = G @ Q if is_right else G.T @ Q
        M, V = 0.9 * M + 0.1 * P, 0.999 * V + 0.001 * P.square()
        N = M / (1 - 0.9**number) / ((V / (1 - 0.999**number)).sqrt() + 1e-8)
        update = (N @ Q.T if is_right else Q @ N.T) + max(shape) ** 0.5 * polar_factor(X, 5)
        torch.testing.assert_close(before - weight.detach(), 0.1 * update, rtol=1e-3, atol=1e-4)
        ROUNDING.check(state["residual_reach"], reach)
        # the momentum is kept in the order of the moments
        kept = decode(Coded(state["residual_codes"], state["residual_scales"]), R.numel())
        R = kept.view(R.shape) if is_right else kept.view(R.T.shape).T


def test_without_the_setting_momentum_is_forgotten():
    weight, optimizer = training((24, 10))
    weight.grad = gaussian(24, 10, seed=0)
    optimizer.step()
    [state] = optimizer.state[weight].values()
    assert state["residual_codes"].shape == (1, 128)
    optimizer.param_groups[0]["residual_momentum"] = 0.0
    optimizer.step()
    assert not [key for key in state if key.startswith("residual")]


def test_bits_may_change_between_steps():
    weight, optimizer = training((24, 10), residual_bits=2)
    for bits in (2, 4, 2):
        optimizer.param_groups[0]["residual_bits"] = bits
        weight.grad = gaussian(24, 10, seed=bits)
        optimizer.step()
        [state] = optimizer.state[weight].values()
        assert Coded(state["residual_codes"], state["residual_scales"]).bits == bits


def test_a_gradient_of_zeros_changes_nothing_at_first():
    weight, optimizer = training((24, 10))
    weight.grad = torch.zeros(24, 10)
    optimizer.step()
    assert not weight.any()
