"""The optimizer in one process against the same algorithm written simply, with a dense SVD."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from matrices import changing_spectrum, gaussian
from one_process import feed, optimizer_of, parameters_of, train
from small_model import DEFAULTS, REFRESHING, WHOLE_SKETCH, SmallModel, check_alike, training
from tolerances import CODES, FP64, LOW_PRECISION, REFERENCE
from torch import Tensor, nn

from arg_dist import AdaRankGrad, ConfigError, param_groups
from arg_dist.sharding.shard import as_reals
from arg_dist.simple import AdaRankGradSimple, orthogonalized
from arg_dist.subspace import norms, orthonormal
from arg_dist.subspace.residual import COEFFICIENTS

RATIOS = (0.45, 0.8, 0.3, 0.9, 0.6)


def simple_of(*weights: Tensor, **settings: Any) -> AdaRankGradSimple:
    """The simple optimizer of copies of these weights, called ``w0``, ``w1``, ..."""
    named = [(f"w{i}", nn.Parameter(weight.clone())) for i, weight in enumerate(weights)]
    return AdaRankGradSimple(named, **{"max_rank": 4, "min_rank": 1, **settings})


def rank_of(optimizer: AdaRankGradSimple) -> int:
    return optimizer.state[parameters_of(optimizer)[0]]["w0"]["basis"].shape[1]


@pytest.mark.parametrize("residual", ["none", "scaled", "matched", "orthogonalized"])
@pytest.mark.parametrize("transport", ["squared", "ldadam", "paper"])
@pytest.mark.parametrize(
    ("shape", "side"),
    [((13, 7), "right"), ((7, 13), "left"), ((8, 8), "left"), ((7, 11), "right")],
)
def test_fifty_steps_with_changing_ranks_are_those_of_the_simple_one(
    shape, side, transport, residual
):
    check_fifty_steps(shape, side=side, transport=transport, residual=residual)


@pytest.mark.parametrize("residual", ["scaled", "orthogonalized"])
@pytest.mark.parametrize("shape", [(13, 7), (7, 13), (8, 8)])
def test_fifty_steps_are_those_of_the_simple_one_as_a_gpu_takes_them(monkeypatch, shape, residual):
    for module in (norms, orthonormal):
        monkeypatch.setattr(module, "in_host_memory", lambda part: False)
    check_fifty_steps(shape, side="auto", transport="squared", residual=residual)


def check_fifty_steps(shape: tuple[int, int], *, side: str, transport: str, residual: str) -> None:
    """Weights after fifty steps with changing ranks are those of the simple optimizer."""
    settings = {
        "lr": 1e-3, "weight_decay": 0.1, "max_rank": 6, "min_rank": 2, "energy": 0.95,
        "scale": 0.5, "transport": transport, "side": side, "residual": residual,
        "min_gap": 10, "max_gap": 10, "refresh_below": 0.0, "hysteresis": 0.0,
    }  # fmt: skip
    weight = gaussian(*shape, seed=1)
    simple, optimizer = simple_of(weight, **settings), optimizer_of(weight, **settings)
    ranks = []
    for gradient in changing_spectrum(*shape, RATIOS, each=10):
        feed(simple, gradient)
        feed(optimizer, gradient)
        ranks.append(rank_of(simple))
        assert optimizer.stats()[0]["rank"] == ranks[-1]
    assert ranks[::10] == [2, 6, 2, 6, ranks[40]] and ranks[40] in (3, 4)
    REFERENCE.check(parameters_of(optimizer)[0].detach(), parameters_of(simple)[0].detach())


# -- a model, under every preset -------------------------------------------------------------------


def trained_model(kind: type[torch.optim.Optimizer], **settings: Any):
    model = SmallModel()
    return training(model, kind(param_groups(model), weight_decay=0.1, **WHOLE_SKETCH, **settings))


@pytest.mark.parametrize("preset", DEFAULTS)
def test_a_model_trains_alike_under_every_preset(preset):
    simple = trained_model(AdaRankGradSimple, **DEFAULTS[preset])
    in_codes = preset == "pretraining"
    check_alike(trained_model(AdaRankGrad, **DEFAULTS[preset]), simple, in_codes=in_codes)
    # the gradient of `late` comes late, and bases end early unless the preset has that switched off
    assert ["late.weight" in bases for bases in simple.bases].index(True) == 7
    refreshes = max(count for _, count in simple.bases[-1].values())
    assert refreshes == (1 if preset == "paper" else 3)


@pytest.mark.parametrize("preset", DEFAULTS)
def test_a_model_trains_alike_where_bases_and_ranks_change_often(preset):
    settings = {**REFRESHING, **DEFAULTS[preset]}
    simple = trained_model(AdaRankGradSimple, **settings)
    check_alike(trained_model(AdaRankGrad, **settings), simple, in_codes=preset == "pretraining")
    changing = [name for name in simple.bases[-1] if len(simple.ranks(name)) > 1]
    assert len(changing) >= 3
    assert all(count >= 4 for _, count in simple.bases[-1].values())


@pytest.mark.parametrize("bits", [2, 4])
def test_a_model_trains_alike_with_momentum_of_the_residual(bits):
    settings = {**REFRESHING, "residual_momentum": 0.9, "residual_bits": bits}
    simple = trained_model(AdaRankGradSimple, **settings)
    check_alike(trained_model(AdaRankGrad, **settings), simple, in_codes=True)
    without = trained_model(AdaRankGradSimple, **REFRESHING, residual_momentum=0.0)
    assert abs(simple.losses[-1] / without.losses[-1] - 1) > 4 * CODES.relative


# -- other parameters, groups and settings ---------------------------------------------------------

FREQUENT = {"min_gap": 3, "max_gap": 5, "lr": 1e-3, "weight_decay": 0.1, **WHOLE_SKETCH}


@pytest.mark.parametrize(
    "shape", [(), (7,), (1, 9), (9, 1), (0, 3), (3, 16, 8), (9, 3, 2, 2)], ids=str
)
def test_vectors_stacks_and_kernels_train_as_in_the_optimizer(shape):
    check_alike_in_one_process(gaussian(*shape), [gaussian(*shape, seed=i) for i in range(1, 13)])


@pytest.mark.parametrize(
    "weight",
    [gaussian(9, 6).T, gaussian(9, 6).double(), torch.view_as_complex(gaussian(9, 6, 2))],
    ids=["transposed", "double", "complex"],
)
def test_any_kind_of_matrix_trains_as_in_the_optimizer(weight):
    check_alike_in_one_process(weight, [weight * size for size in (1.0, -0.5, 2.0, 0.1, 1.0, 3.0)])


def check_alike_in_one_process(weight: Tensor, gradients: list[Tensor]) -> None:
    steps = [[gradient] for gradient in gradients]
    (actual,) = train(optimizer_of(weight, **FREQUENT), steps)
    (simple,) = train(simple_of(weight, **FREQUENT), steps)
    REFERENCE.check(as_reals(actual), as_reals(simple))
    assert actual.dtype == simple.dtype
    assert not (weight.numel() and torch.equal(simple, weight))


def test_bf16_weights_are_rounded_once_a_step():
    gradients = [[gaussian(9, 6, seed=i).bfloat16()] for i in range(1, 7)]
    (actual,), (simple,) = (
        train(kind(gaussian(9, 6).bfloat16(), **{**FREQUENT, "lr": 1e-2}), gradients)
        for kind in (optimizer_of, simple_of)
    )
    LOW_PRECISION.check(actual, simple)


def test_groups_have_settings_of_their_own_and_rates_may_change():
    trained = []
    for kind in (AdaRankGrad, AdaRankGradSimple):
        weights = [nn.Parameter(gaussian(9, 6, seed=i)) for i in range(4)]
        groups = [
            {"params": weights[:1], "residual": "matched", "side": "left"},
            {"params": weights[1:2], "low_rank": False, "full_rank_scale": 2.0},
            {"params": weights[2:], "param_names": ["a", "b"], "lr": torch.tensor(1e-3)},
        ]
        optimizer = kind(groups, max_rank=4, min_rank=1, **FREQUENT)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
        for step in range(12):
            feed(optimizer, *(gaussian(9, 6, seed=10 * step + i) for i in range(3)), None)
            schedule.step()
        trained.append([weight.detach() for weight in weights])
    for actual, simple in zip(*trained, strict=True):
        REFERENCE.check(actual, simple)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("transport", "none"),
        ("state_budget", 10**9),
        ("matmul_precision", "high"),
        ("polar_precision", "bf16"),
        ("targets", ("layers",)),
        ("exclude", ("head",)),
    ],
)
def test_what_it_does_not_implement_is_refused(setting, value):
    with pytest.raises(ConfigError, match=f"{setting}: got .*use arg_dist.AdaRankGrad"):
        simple_of(gaussian(5, 4), **{setting: value})


def test_the_simple_one_refuses_a_rule_it_does_not_know():
    with pytest.raises(ValueError, match="transport: got 'none'"):
        simple_of(gaussian(5, 4), transport="none")


def test_settings_and_names_are_checked_as_those_of_the_optimizer():
    with pytest.raises(ConfigError, match="did you mean 'energy'"):
        simple_of(gaussian(5, 4), enrgy=0.9)
    with pytest.raises(ConfigError, match="'a' occurs twice"):
        AdaRankGradSimple([("a", nn.Parameter(gaussian(5, 4))) for _ in range(2)])


def test_a_broken_gradient_changes_nothing():
    weights, nan = [gaussian(8, 6, seed=1), gaussian(4, seed=2)], torch.full((4,), torch.nan)
    optimizer, skipping = simple_of(*weights), simple_of(*weights, nonfinite="skip")
    with pytest.raises(FloatingPointError, match="gradient of w1 is NaN or infinite"):
        feed(optimizer, weights[0], nan)
    feed(skipping, weights[0], nan)
    for each in (optimizer, skipping):
        assert all(map(torch.equal, parameters_of(each), weights))
        assert not each.state


def test_a_closure_runs_with_gradients():
    optimizer = simple_of(gaussian(8, 6))
    (parameter,) = parameters_of(optimizer)

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) > optimizer.step(closure) > 0


def test_training_goes_on_from_a_saved_state_to_the_bit():
    gradients = [gaussian(8, 6, seed=seed) for seed in range(12)]
    optimizer = simple_of(gaussian(8, 6), **FREQUENT)
    for gradient in gradients[:7]:
        feed(optimizer, gradient)
    resumed = simple_of(parameters_of(optimizer)[0].detach(), **FREQUENT)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for gradient in gradients[7:]:
        for each in (optimizer, resumed):
            feed(each, gradient)
    assert torch.equal(*parameters_of(resumed), *parameters_of(optimizer))


# -- the residual by another way -------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [0, 1])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (1, 5)])
def test_newton_schulz_is_a_polynomial_of_the_singular_values(shape, outputs):
    S, G = gaussian(*shape).double(), 3 * gaussian(*shape, seed=1).double()
    # S^_i = S_i / rms(S_i) for each row of W ;  O = U f(f(...f(s / ||s||))) V^T
    mean_sq = S.square().mean(1 - outputs, keepdim=True)
    equal = S / (mean_sq + 1e-4 * G.square().mean()).sqrt()
    left, values, right = torch.linalg.svd(equal, full_matrices=False)
    values, (a, b, c) = values / S.numel() ** 0.5, COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    expected = max(shape) ** 0.5 * (left * values) @ right
    FP64.check(orthogonalized(S, float(G.norm()), 5, outputs=outputs), expected)
