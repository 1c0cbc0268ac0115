"""`state_budget` in one process: what it does to ranks and state, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from matrices import gaussian, geometric, with_spectrum
from one_process import feed, optimizer_of, parameters_of
from torch import Tensor, nn

from arg_dist import AdaRankGrad, ConfigError

SHAPES = [(96, 48), (48, 96), (40, 40), (31,)]
RATIOS = [0.95, 0.6, 0.85]
"""Of one singular value to the next: directions of these matrices are not worth the same."""
SETTINGS = {"max_rank": 30, "min_rank": 2, "energy": 0.95, "min_gap": 3, "max_gap": 9}
STEPS = 25


def build(**settings) -> AdaRankGrad:
    weights = [gaussian(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    return optimizer_of(*weights, **{**SETTINGS, **settings})


SIGNALS = [
    with_spectrum(*shape, geometric(min(shape), ratio), seed=i)
    for i, (shape, ratio) in enumerate(zip(SHAPES[:3], RATIOS, strict=True))
]


def gradients(step: int) -> list[Tensor]:
    return [
        signal + 0.01 * gaussian(*shape, seed=100 * step + i)
        for i, (shape, signal) in enumerate(zip(SHAPES, [*SIGNALS, torch.zeros(31)], strict=True))
    ]


def ranks_of(optimizer: AdaRankGrad) -> dict[str, int]:
    return {entry["name"]: entry["rank"] for entry in optimizer.stats()}


def trained(first: int = 0, last: int = STEPS, **settings):
    """An optimizer after its steps; ranks and bytes of state after each."""
    optimizer = build(**settings)
    seen = []
    for step in range(first, last):
        feed(optimizer, *gradients(step))
        seen.append((ranks_of(optimizer), optimizer.state_bytes()))
    return optimizer, seen


def units(optimizer: AdaRankGrad) -> list[dict]:
    return [unit for each in parameters_of(optimizer) for unit in optimizer.state[each].values()]


def test_the_sum_stays_within_a_budget_that_binds_and_uses_it():
    free = max(size for _, size in trained()[1])
    budget = free * 2 // 3
    _, seen = trained(state_budget=budget)
    assert all(size <= budget for _, size in seen)
    assert max(size for _, size in seen) >= 0.85 * budget
    first, last = seen[0][0], seen[-1][0]
    assert first != last
    assert all(rank >= SETTINGS["min_rank"] for ranks, _ in seen for rank in ranks.values())


def test_bytes_go_where_they_keep_the_most_energy():
    """More than with the same bytes as one fraction of all largest ranks."""
    budget = max(size for _, size in trained()[1]) * 2 // 3
    by_energy, seen = trained(state_budget=budget, energy=1.0)
    every = [trained(max_rank=rank / 96, energy=1.0)[0] for rank in range(20, 60, 4)]
    even = max(
        (each for each in every if each.state_bytes() <= budget), key=AdaRankGrad.state_bytes
    )
    assert even.state_bytes() >= 0.9 * seen[-1][1]

    def kept(optimizer: AdaRankGrad) -> float:
        return sum(
            entry["energy"] * entry["shape"][0] * entry["shape"][1] for entry in optimizer.stats()
        )

    assert kept(by_energy) > 1.01 * kept(even)


def test_a_budget_wider_than_needed_changes_nothing():
    plain, seen = trained()
    wide, same = trained(state_budget="1MiB")
    assert same == seen
    for one, other in zip(parameters_of(plain), parameters_of(wide), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(units(plain), units(wide), strict=True):
        assert ("spectrum" in other) == ("basis" in one)
        assert all(
            torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one
        )


def test_spectra_are_kept_with_a_budget_only():
    optimizer, _ = trained(state_budget="1MiB")
    for unit in units(optimizer):
        if "basis" in unit:
            spectrum = unit["spectrum"]
            assert len(spectrum) == SETTINGS["max_rank"]
            assert sorted(spectrum, reverse=True) == spectrum and sum(spectrum) <= 1 + 1e-6
    assert not any("spectrum" in unit for unit in units(trained()[0]))


def test_a_budget_below_the_smallest_ranks_is_refused_before_anything_changes():
    optimizer = build(state_budget="6KiB")
    before = [weight.detach().clone() for weight in parameters_of(optimizer)]
    with pytest.raises(ConfigError) as raised:
        feed(optimizer, *gradients(0))
    message = str(raised.value)
    assert message.startswith("state_budget: got 6.0 KiB (6144 bytes); ")
    assert "3 low-rank matrices" in message and "lower min_rank" in message
    assert all(map(torch.equal, parameters_of(optimizer), before))
    assert not any(units(optimizer))
    enough = int(re.search(r"at least (\d+) bytes", message)[1])
    _, seen = trained(state_budget=enough)
    assert all(size <= enough for _, size in seen)
    assert seen[-1][0] == dict.fromkeys(seen[-1][0], 2)
    with pytest.raises(ConfigError, match=f"at least {enough} bytes"):
        trained(state_budget=enough - 1)


def test_state_of_parameters_that_are_frozen_meanwhile_counts():
    budget = 55_000
    optimizer = build(state_budget=budget)
    for step in range(STEPS):
        if step == 8:
            parameters_of(optimizer)[0].requires_grad_(False)
        feed(optimizer, *gradients(step))
        assert optimizer.state_bytes() <= budget
    assert ranks_of(optimizer)["w0"] > 2


def test_a_parameter_that_never_had_a_gradient_gets_its_rank_later():
    budget = 55_000
    optimizer = build(state_budget=budget)
    for step in range(STEPS):
        given = gradients(step)
        feed(optimizer, *(given if step >= 8 else [None, *given[1:]]))
        assert optimizer.state_bytes() <= budget
    assert ranks_of(optimizer)["w0"] >= 2


@pytest.mark.filterwarnings("ignore:state_budget")
def test_groups_added_on_the_way_share_the_budget():
    budget = 60_000
    optimizer = build(state_budget=budget)
    for step in range(STEPS):
        more = []
        if step >= 8:
            more = [with_spectrum(64, 32, geometric(32, 0.9)) + 0.01 * gaussian(64, 32, seed=step)]
        if step == 8:
            optimizer.add_param_group({"params": [("late", nn.Parameter(gaussian(64, 32)))]})
        feed(optimizer, *gradients(step), *more)
        assert optimizer.state_bytes() <= budget
    assert ranks_of(optimizer)["late"] >= 2


def copy_of(optimizer: AdaRankGrad, **settings) -> AdaRankGrad:
    other = build(**settings)
    for ours, theirs in zip(parameters_of(other), parameters_of(optimizer), strict=True):
        ours.data.copy_(theirs.data)
    other.load_state_dict(optimizer.state_dict())
    return other


def go_on(optimizer: AdaRankGrad, first: int, last: int) -> list[int]:
    sizes = []
    for step in range(first, last):
        feed(optimizer, *gradients(step))
        sizes.append(optimizer.state_bytes())
    return sizes


def test_loaded_state_goes_on_to_the_bit():
    straight, _ = trained(0, 10, state_budget=55_000)
    resumed = copy_of(straight, state_budget=55_000)
    go_on(straight, 10, STEPS)
    go_on(resumed, 10, STEPS)
    assert ranks_of(resumed) == ranks_of(straight)
    assert all(map(torch.equal, parameters_of(resumed), parameters_of(straight)))


def test_state_from_before_a_budget_comes_down_to_it():
    optimizer, seen = trained(0, 10)
    budget = seen[-1][1] * 2 // 3
    resumed = copy_of(optimizer, state_budget=budget)
    message = "state_budget: the present state takes .*, from before this budget"
    with pytest.warns(UserWarning, match=message):
        sizes = go_on(resumed, 10, STEPS)
    assert sizes[-1] <= budget
    without = copy_of(resumed)
    go_on(without, STEPS, STEPS + 10)
    assert not any("spectrum" in unit for unit in units(without))


def test_a_process_sends_nothing_for_it_alone():
    optimizer, _ = trained(state_budget=55_000)
    assert optimizer.collectives() == 0
