"""What becomes of the moments when the basis changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import gaussian
from one_process import one_step
from tolerances import ROUNDING

from arg_dist.subspace import transport
from arg_dist.subspace.transport import rank_one_energy, transport_moments

STEP, BETAS = 30, (0.9, 0.999)
RULES = ["squared", "paper", "ldadam", "none"]
widths = st.integers(1, 6)


def basis(size: int, width: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(gaussian(size, width, seed=seed)).Q


def example(rows: int, old: int, new: int) -> dict[str, torch.Tensor]:
    gradient = gaussian(rows, 6, seed=1)
    vectors = basis(6, new, seed=2)
    projected = gradient @ vectors
    return {
        "exp_avg": gaussian(rows, old, seed=3),
        "exp_avg_sq": gaussian(rows, old, seed=4).square(),
        "rotation": vectors.T @ basis(6, old, seed=5),
        "projected": projected,
        "energies": projected.double().square().sum(0),
    }


def moved(inputs: dict[str, torch.Tensor], rule: str) -> tuple[torch.Tensor, torch.Tensor]:
    return transport_moments(**inputs, rule=rule, step=STEP, betas=BETAS)


def entry_by_entry(inputs: dict[str, torch.Tensor], rule: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The table of :mod:`arg_dist.subspace.transport`, one number at a time."""
    keys = ("exp_avg", "exp_avg_sq", "rotation", "projected")
    m, v, r, p = (inputs[key].double() for key in keys)
    weight1, weight2 = 1 - BETAS[0] ** STEP, 1 - BETAS[1] ** STEP
    new_m, new_v = torch.zeros_like(p), torch.zeros_like(p)
    old = range(m.shape[1])
    for k in range(p.shape[0]):
        for i in range(p.shape[1]):
            row, column = sum(p[k, j] ** 2 for j in range(p.shape[1])), sum(p[:, i] ** 2)
            fair = weight2 * row * column / (p**2).sum()
            mean = sum(r[i, j] * m[k, j] for j in old)
            new_m[k, i] = mean
            if rule == "squared":
                covered = sum(r[i, j] ** 2 for j in old)
                kept = sum(r[i, j] ** 2 * v[k, j] for j in old)
                new_v[k, i] = kept + max(0.0, 1 - covered) * fair
            elif rule == "paper":
                new_v[k, i] = abs(sum(r[i, j] * v[k, j] for j in old))
            elif rule == "ldadam":
                variances = [v[k, j] / weight2 - (m[k, j] / weight1) ** 2 for j in old]
                spread = sum(r[i, j] ** 2 * variances[j] for j in old)
                new_v[k, i] = weight2 * abs(spread + (mean / weight1) ** 2)
            else:
                new_m[k, i] = m[k, i] if i in old else 0.0
                new_v[k, i] = v[k, i] if i in old else fair
    return new_m, new_v


@pytest.mark.parametrize("rule", RULES)
@given(rows=widths, old=widths, new=widths)
def test_each_rule_is_its_formula(rule, rows, old, new):
    inputs = example(rows, old, new)
    for actual, expected in zip(moved(inputs, rule), entry_by_entry(inputs, rule), strict=True):
        ROUNDING.check(actual, expected)


@pytest.mark.parametrize("rule", RULES)
def test_the_old_moments_stay_as_they_are(rule):
    inputs = example(5, 3, 4)
    before = inputs["exp_avg"].clone(), inputs["exp_avg_sq"].clone()
    moved(inputs, rule)
    assert torch.equal(inputs["exp_avg"], before[0])
    assert torch.equal(inputs["exp_avg_sq"], before[1])


@given(rows=widths, old=widths, new=widths)
def test_the_second_moment_stays_positive(rows, old, new):
    assert moved(example(rows, old, new), "squared")[1].min() > 0


@given(rows=widths, old=widths, new=widths, signs=st.lists(st.booleans(), min_size=6, max_size=6))
def test_the_second_moment_does_not_see_the_signs_of_basis_vectors(rows, old, new, signs):
    inputs = example(rows, old, new)
    flip = torch.tensor([-1.0 if sign else 1.0 for sign in signs])
    flipped = {
        **inputs,
        "rotation": inputs["rotation"] * flip[:old],
        "exp_avg": inputs["exp_avg"] * flip[:old],
    }
    for actual, expected in zip(moved(flipped, "squared"), moved(inputs, "squared"), strict=True):
        assert torch.equal(actual, expected)


def test_an_unchanged_basis_changes_no_moment():
    inputs = {**example(5, 4, 4), "rotation": torch.eye(4)}
    for rule in RULES:
        for actual, key in zip(moved(inputs, rule), ("exp_avg", "exp_avg_sq"), strict=True):
            ROUNDING.check(actual, inputs[key])


def test_the_fair_start_has_the_row_and_direction_sums_of_the_gradient():
    projected = gaussian(7, 3)
    energies = projected.double().square().sum(0)
    estimate = rank_one_energy(projected, energies)
    ROUNDING.check(estimate.sum(0), energies)
    ROUNDING.check(estimate.sum(1), projected.square().sum(1))


def largest_step_after_growth() -> float:
    """Largest entry of N while the rank grows from 8 to 32, long after the start."""
    state, largest = {}, 0.0
    settings = {
        "energy": 1.0,
        "min_gap": 50,
        "max_gap": 50,
        "refresh_below": 0.0,
        "residual": "none",
    }
    for step in range(1200):
        rank = 8 if step < 1000 else 32
        update = one_step(
            gaussian(48, 40, seed=step), state, max_rank=rank, min_rank=rank, **settings
        )
        if step >= 1000:
            largest = max(largest, float(update.direction.abs().max()))
    assert state["rank"] == 32
    return largest


def test_new_directions_take_no_outsized_steps(monkeypatch):
    assert largest_step_after_growth() < 1.5
    monkeypatch.setattr(
        transport, "rank_one_energy", lambda projected, energies: torch.zeros_like(projected)
    )
    assert largest_step_after_growth() > 2.5
