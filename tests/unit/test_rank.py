"""How many directions are kept, and when new ones are looked for."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import SHAPES, gaussian, geometric, with_spectrum
from one_process import feed, one_step, optimizer_of, parameters_of

from arg_dist.sharding.plan import phase_of
from arg_dist.subspace.rank import (
    choose_rank,
    exit_early,
    gap_after_decay,
    gap_until_next,
    numerical_rank,
)


def residual_search(gradient: torch.Tensor, energy: float) -> int:
    """The paper's search: one residual for each candidate."""
    left, values, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    for rank in range(1, len(values)):
        residual = gradient - left[:, :rank] * values[:rank] @ right[:rank]
        if residual.square().sum() <= (1 - energy) * gradient.double().square().sum():
            return rank
    return len(values)


def energies_of(*singular: float) -> torch.Tensor:
    return torch.tensor(singular, dtype=torch.float64).square()


@given(SHAPES, st.floats(0.05, 0.99))
def test_rank_is_that_of_a_search_over_residuals(shape, energy):
    gradient = gaussian(*shape)
    energies = torch.linalg.svdvals(gradient.double()).square()
    rank = choose_rank(
        energies, float(energies.sum()), energy=energy, smallest=1, largest=min(shape)
    )
    assert rank == residual_search(gradient, energy)


@pytest.mark.parametrize(
    ("smallest", "largest", "expected"), [(1, 8, 3), (4, 8, 4), (1, 2, 2), (7, 9, 6), (6, 5, 5)]
)
def test_rank_stays_within_its_bounds_and_the_sketch(smallest, largest, expected):
    energies = energies_of(3, 3, 3, 0.1, 0.1, 0.1)
    norm_sq = float(energies.sum())
    assert (
        choose_rank(energies, norm_sq, energy=0.9, smallest=smallest, largest=largest) == expected
    )


@given(SHAPES, st.floats(0.1, 0.9), st.integers(1, 20), st.integers(1, 40))
def test_a_rank_is_rounded_up_to_a_multiple(shape, energy, multiple, largest):
    energies = torch.linalg.svdvals(gaussian(*shape).double()).square()
    largest = min(largest, min(shape))
    given = {"energy": energy, "smallest": 1, "largest": largest}
    exact = choose_rank(energies, float(energies.sum()), **given)
    rank = choose_rank(energies, float(energies.sum()), **given, multiple=multiple)
    assert rank % multiple == 0 or rank == largest
    assert exact <= rank < exact + multiple


def test_ranks_of_an_optimizer_are_multiples_except_the_largest():
    weights = [gaussian(40, 30), gaussian(40, 10), gaussian(30, 40)]
    optimizer = optimizer_of(*weights, max_rank=0.5, min_rank=1, rank_multiple=4, energy=0.5)
    feed(optimizer, *(gaussian(*weight.shape, seed=1) for weight in weights))
    ranks = [
        optimizer.state[each][f"w{i}"]["rank"] for i, each in enumerate(parameters_of(optimizer))
    ]
    assert ranks[0] % 4 == 0 and ranks[1] in (4, 5) and ranks[2] % 4 == 0


@given(SHAPES, st.floats(0.1, 0.9), st.floats(0, 0.1), st.integers(1, 40))
def test_a_rank_goes_no_further_than_the_nearest_one_near_the_energy(shape, energy, slack, before):
    energies = torch.linalg.svdvals(gaussian(*shape).double()).square()
    norm_sq, bounds = float(energies.sum()), {"smallest": 1, "largest": min(shape)}
    before = min(before, min(shape))
    fewest, most = (
        choose_rank(energies, norm_sq, energy=energy + way * slack, **bounds) for way in (-1, 1)
    )
    rank = choose_rank(energies, norm_sq, energy=energy, hysteresis=slack, before=before, **bounds)
    assert fewest <= rank <= most
    assert rank == min(range(fewest, most + 1), key=lambda candidate: abs(candidate - before))


def test_hysteresis_keeps_a_rank_that_noise_would_move():
    near, settings = geometric(10, 0.7), {"max_rank": 9, "energy": 0.8, "min_gap": 1, "max_gap": 1}
    changes = {}
    for hysteresis in (0.0, 0.05):
        state, ranks = {}, []
        for seed in range(20):
            noisy = with_spectrum(16, 10, near) + 0.1 * gaussian(16, 10, seed=seed)
            one_step(noisy, state, hysteresis=hysteresis, **settings)
            ranks.append(state["rank"])
        changes[hysteresis] = sum(a != b for a, b in pairwise(ranks))
    assert changes[0.0] >= 4
    assert changes[0.05] == 0


def test_energy_that_the_sketch_missed_counts_as_discarded():
    assert choose_rank(energies_of(2, 1), 100.0, energy=0.9, smallest=1, largest=2) == 2


def test_rounding_noise_is_no_direction():
    energies = energies_of(1, 0.5, 1e-9, 1e-9)
    assert numerical_rank(energies) == 2
    assert choose_rank(energies, 1.25, energy=1.0, smallest=4, largest=4) == 2
    assert choose_rank(torch.zeros(3).double(), 1.0, energy=0.9, smallest=2, largest=3) == 1


def test_rank_falls_and_rises_with_the_gradient():
    state, ranks = {}, []
    for ratio in (0.9, 0.2, 0.9):
        one_step(
            with_spectrum(16, 10, geometric(10, ratio)),
            state,
            max_rank=9,
            energy=0.9,
            hysteresis=0.0,
            min_gap=1,
            max_gap=1,
        )
        ranks.append(state["rank"])
    assert ranks == [8, 1, 8]


@pytest.mark.parametrize(
    ("since", "norm", "expected"), [(20, 0.49, True), (20, 0.51, False), (19, 0.0, False)]
)
def test_a_basis_ends_early_only_after_the_shortest_gap_and_a_decayed_gradient(
    since, norm, expected
):
    decided = exit_early(
        since_refresh=since, shortest=20, kept_sq=norm**2, kept_sq_at_refresh=1.0, refresh_below=0.5
    )
    assert decided is expected


def refresh_steps(sizes: list[float], **settings) -> list[int]:
    """Steps (from 0) that found a new basis, for gradients of these sizes."""
    state, steps, refreshes = {}, [], 0
    for step, size in enumerate(sizes):
        one_step(size * gaussian(8, 6), state, max_rank=3, **settings)
        if state["refreshes"] > refreshes:
            steps.append(step)
        refreshes = state["refreshes"]
    return steps


GROWING = {"min_gap": 3, "max_gap": 20}
"""From step 0: gaps of 3, 6, 12, 20, 20 where the phase is 0."""


def test_gaps_double_from_the_shortest_to_the_longest():
    assert refresh_steps([1.0] * 70, phase=0.0, **GROWING) == [0, 3, 9, 21, 41, 61]
    assert refresh_steps([1.0] * 9, phase=0.0, min_gap=2, max_gap=2) == [0, 2, 4, 6, 8]


@given(st.integers(0, 60), st.integers(1, 50), st.integers(0, 500), st.floats(0, 0.999))
def test_gaps_stay_within_their_bounds_and_grow(refreshes, shortest, more, phase):
    bounds = {"first": shortest, "longest": shortest + more, "phase": phase}
    gap, following = (gap_until_next(refreshes + i, **bounds) for i in (0, 1))
    assert shortest <= gap <= following <= shortest + more
    assert following >= min(shortest + more, 2 * gap)


def test_phases_keep_the_refreshes_of_matrices_apart():
    seconds = {refresh_steps([1.0] * 12, min_gap=5, max_gap=20, phase=p / 5)[1] for p in range(5)}
    assert seconds == {5, 6, 7, 8, 9}


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_decayed_gradient_is_refreshed_early_whatever_the_scale_of_the_loss(scale):
    sizes = [scale] * 12 + [0.4 * scale] * 12
    # step 12 is the first small one, the next one sees it, the one after it refreshes
    assert refresh_steps(sizes, phase=0.0, **GROWING)[:4] == [0, 3, 9, 14]
    assert refresh_steps(sizes, phase=0.0, refresh_below=0.3, **GROWING) == [0, 3, 9, 21]


def test_no_basis_ends_before_the_shortest_gap():
    sizes = [1.0] * 10 + [0.4] * 10
    settings = {"phase": 0.0, "min_gap": 5, "max_gap": 40}
    assert refresh_steps(sizes, **settings) == [0, 5, 12]
    # small from step 6 on: the basis of step 5 has served its five steps at step 10
    assert refresh_steps([1.0] * 6 + [0.4] * 14, **settings) == [0, 5, 11]


PHASE = st.floats(0, 1, exclude_max=True)


@given(st.integers(1, 50), st.integers(0, 500), st.integers(1, 50), PHASE, st.integers(0, 60))
def test_a_decay_shortens_a_gap_once_by_the_phase(since, more, spread, phase, later):
    gap = since + more
    short = gap_after_decay(gap, since_refresh=since, spread=spread, phase=phase)
    # never later than without the decay, and within the spread
    assert short <= gap and short <= since + spread
    assert short >= min(gap, since + 1)
    # still decayed in the steps that follow: nothing changes, and nothing is put off
    assert gap_after_decay(short, since_refresh=since + later, spread=spread, phase=phase) == short


@given(st.integers(20, 50), st.lists(PHASE, min_size=2, max_size=9), st.integers(1, 30))
def test_decayed_matrices_take_turns_in_the_order_of_their_phases(since, phases, spread):
    phases.sort()
    gaps = [gap_after_decay(999, since_refresh=since, spread=spread, phase=p) for p in phases]
    assert gaps == sorted(gaps)
    assert gap_after_decay(999, since_refresh=since, spread=spread, phase=0.0) == since + 1
    last = gap_after_decay(999, since_refresh=since, spread=spread, phase=1 - 1e-9)
    assert last == since + spread


def test_gradients_that_fall_together_are_refreshed_by_turns():
    count, turns, fall = 40, 10, 15
    optimizer = optimizer_of(
        *[gaussian(8, 6, seed=seed) for seed in range(count)], min_gap=turns, first_gap=45
    )
    refreshes = [0]
    for step in range(fall + 2 + turns):
        size = 1.0 if step < fall else 0.4
        feed(optimizer, *[size * gaussian(8, 6, seed=seed) for seed in range(count)])
        refreshes.append(sum(matrix["refreshes"] for matrix in optimizer.stats()))
    each = [after - before for before, after in pairwise(refreshes)]
    assert each[0] == count and not any(each[1 : fall + 2])
    assert sum(each[fall + 2 :]) == count
    assert max(each[1:]) <= 2 * count / turns


def test_the_papers_exit_rule_puts_nothing_off():
    # it has no shortest gap: one step to spread refreshes over
    for phase in (0.0, 0.999):
        settings = {"preset": "paper", "refresh_below": 0.5, "phase": phase}
        assert refresh_steps([1.0] * 12 + [0.4] * 12, **settings) == [0, 14]


def test_phases_follow_from_names_alone_and_spread_out():
    phases = [phase_of(f"layers.{i}.weight") for i in range(200)]
    assert phases == [phase_of(f"layers.{i}.weight") for i in range(200)]
    counts = torch.histc(torch.tensor(phases), bins=4, min=0, max=1)
    assert counts.min() > 30
