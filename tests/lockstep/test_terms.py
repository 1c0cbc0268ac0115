"""Gradients that are terms of a mean: the same steps as with the mean, which is never formed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lockstep_steps import counted
from matrices import gaussian, whole_numbers
from one_process import one_step
from tolerances import BF16_PRODUCTS, ENERGY, ROUNDING
from torch import Tensor

from arg_dist.algorithm import LowRankUpdate, State, StepFacts, adam_step
from arg_dist.config import AdaRankGradConfig
from arg_dist.recording import requests_of_a_step, rounds_of_matrix
from arg_dist.sharding.drivers import run_lockstep
from arg_dist.sharding.layout import shard_elements, shard_matrix
from arg_dist.subspace.distributed import MatrixSharding
from arg_dist.terms import sends_whole, step_of_terms, tossed

CPU = torch.device("cpu")
SMALL, LARGE = (24, 16), (24, 400)
"""Of which a refresh forms the mean, and sends sketches."""
RULES = ("none", "matched", "orthogonalized")


def shardings(m: int, n: int, processes: int, *, home: int = 0) -> list[MatrixSharding]:
    """A matrix ``moment x basis`` on so many processes."""
    whole = ((0, m * n),) * processes
    layout = {"spans_columns": True, "home": home, "shard_basis": False, "replicated": True}
    return [shard_matrix(m, n, whole, me=me, terms=True, **layout) for me in range(processes)]


def settings_of(**given) -> AdaRankGradConfig:
    defaults = {"max_rank": 4, "min_rank": 1, "oversample": 2, "energy": 0.6}
    defaults |= {"min_gap": 3, "max_gap": 3}
    return AdaRankGradConfig(**{**defaults, "gradient_sync": "sketch", **given})


def both(sent: int, back: int) -> dict[str, int]:
    return {"residual_sync_bits": sent, "residual_back_bits": back}


def step_together(
    terms: list[Tensor],
    states: list[State],
    layout: list[MatrixSharding],
    settings: AdaRankGradConfig,
    counts: list[int] | None = None,
) -> list[LowRankUpdate | None]:
    """One step with a gradient on each process."""
    processes = len(terms)
    facts = StepFacts(
        name="w",
        norm_sq=sum(float(term.double().square().sum()) for term in terms) / processes,
        kept_sq=sum(float(state.get("kept_sq", 0.0)) for state in states),
        phase=0.0,
    )
    steps = [
        step_of_terms(lambda term=term: term / processes, CPU, state, sharding, settings, facts)
        for term, state, sharding in zip(terms, states, layout, strict=True)
    ]
    return run_lockstep([counted(each, [] if counts is None else counts) for each in steps])


def change_of(update: LowRankUpdate) -> Tensor:
    """``moment x basis``: what the weights change by."""
    change = update.direction @ update.basis.T
    return change if update.outside is None else change + update.outside.view(change.shape)


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_without_a_residual_the_steps_are_those_of_the_mean(shape, processes):
    layout, settings = shardings(*shape, processes, home=1), settings_of(residual="none")
    assert sends_whole(layout[0], settings) == (shape == SMALL)
    states: list[State] = [{} for _ in layout]
    alone: State = {}
    for step in range(8):
        common = gaussian(shape[0], 2, seed=step // 3) @ gaussian(2, shape[1], seed=step // 3)
        terms = [common + 0.1 * gaussian(*shape, seed=10 * step + i) for i in range(processes)]
        updates = step_together(terms, states, layout, settings)
        mean = torch.stack([term / processes for term in terms]).sum(0)
        expected = change_of(one_step(mean, alone, **settings.model_dump()))
        for update in updates:
            ROUNDING.check(change_of(update), expected)
    assert {state["rank"] for state in states} == {alone["rank"]}
    assert alone["refreshes"] == 3
    kept = torch.cat([state["exp_avg"] for state in states])
    ROUNDING.check(kept.abs(), alone["exp_avg"].abs())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [(1, 1), (2, 2), (4, 4), (1, 2)])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("shape", [SMALL, LARGE, (7, 5)])
def test_all_processes_take_the_same_step_in_the_rounds_agreed(rule, bits, momentum, shape):
    layout = shardings(*shape, 3)
    settings = settings_of(residual=rule, residual_momentum=momentum, **both(*bits))
    steady, refreshing = rounds_of_matrix(layout[0], settings)
    states: list[State] = [{} for _ in layout]
    for step in range(5):
        counts: list[int] = []
        terms = [gaussian(*shape, seed=10 * step + i) for i in range(3)]
        changes = map(change_of, step_together(terms, states, layout, settings, counts))
        first, *others = changes
        assert all(torch.equal(first, other) for other in others)
        assert len(set(counts)) == 1
        assert counts[0] <= (refreshing if step in (0, 3) else steady)
    held = [len(state.get("residual_codes", ())) for state in states]
    remembers = rule == "orthogonalized" and momentum > 0
    assert held == [-(-shape[0] * shape[1] // 256) if remembers else 0, 0, 0]


def residual_of(update: LowRankUpdate) -> Tensor:
    return update.outside.view(len(update.direction), -1)


def second_step(
    terms: list[Tensor], shape: tuple[int, int], **given
) -> tuple[list[LowRankUpdate], LowRankUpdate]:
    """Together, and by one process that has the mean, after a first step on a common gradient."""
    layout, settings = shardings(*shape, len(terms)), settings_of(**given)
    states: list[State] = [{} for _ in layout]
    first = whole_numbers(*shape)
    step_together([first for _ in terms], states, layout, settings)
    alone: State = {}
    one_step(first, alone, **settings.model_dump())
    mean = torch.stack([term / len(terms) for term in terms]).sum(0)
    return (
        step_together(terms, states, layout, settings),
        one_step(mean, alone, **settings.model_dump()),
    )


def test_one_bit_is_the_vote_of_the_majority():
    shape = (24, 16)
    terms = [gaussian(*shape, seed=i) for i in range(3)]
    (update, *_), alone = second_step(terms, shape, residual="matched", **both(1, 1))
    signs = [(term - term @ update.basis @ update.basis.T).sign() for term in terms]
    assert torch.equal(residual_of(update).sign(), torch.stack(signs).sum(0).sign())
    # phi ||S_i|| = ||N_i|| sqrt((n - r) / r), whatever was rounded
    rank = update.basis.shape[1]
    expected = update.direction.norm(dim=1) * ((16 - rank) / rank) ** 0.5
    ENERGY.check(residual_of(update).norm(dim=1), expected)
    assert alone.direction.shape[1] == rank


def test_a_term_of_zeros_has_no_vote():
    shape = (24, 16)
    term = gaussian(*shape, seed=3)
    (update, *_), _ = second_step(
        [term, torch.zeros(shape), torch.zeros(shape)],
        shape,
        residual="matched",
        **both(1, 1),
    )
    S = term - term @ update.basis @ update.basis.T
    assert torch.equal(residual_of(update).sign(), S.sign())


@pytest.mark.parametrize("rule", RULES)
def test_what_is_sent_in_bf16_is_summed_in_fp32(rule):
    layout, shape = shardings(*SMALL, 3), SMALL
    states: dict[str, list[State]] = {name: [{} for _ in layout] for name in ("fp32", "bf16")}
    for step in range(5):
        terms = [gaussian(*shape, seed=10 * step + i) for i in range(3)]
        changes = {}
        for precision, held in states.items():
            settings = settings_of(residual=rule, sync_precision=precision)
            updates = step_together(terms, held, layout, settings)
            changes[precision] = change_of(updates[0])
            assert all(torch.equal(change_of(each), changes[precision]) for each in updates)
        distance = (changes["bf16"] - changes["fp32"]).norm() / changes["fp32"].norm()
        BF16_PRODUCTS.check(distance, 0.0)
        assert distance > 0


def test_ties_are_tossed_alike_whoever_tosses_them():
    together = tossed("0|w|3", (0, 1000), CPU)
    assert torch.equal(together[256:512], tossed("0|w|3", (256, 512), CPU))
    assert set(together.tolist()) == {-1.0, 1.0}
    assert abs(float(together.mean())) < 0.1
    others = tossed("0|w|4", (0, 1000), CPU)
    assert abs(float((together * others).mean())) < 0.1


def test_opposite_terms_leave_the_decision_to_the_coin():
    shape = (24, 16)
    term = gaussian(*shape, seed=3)
    settings = {"residual": "matched", **both(1, 1)}
    (update, *_), _ = second_step([term + 1e-3, 1e-3 - term], shape, **settings)
    share = (residual_of(update) > 0).float().mean()
    assert 0.3 < float(share) < 0.7


@pytest.mark.parametrize(("bits", "closeness"), [(2, 0.75), (4, 0.97)])
@pytest.mark.parametrize("rule", ["matched", "orthogonalized"])
def test_more_bits_are_closer_to_the_residual_of_the_mean(bits, closeness, rule):
    shape = (64, 96)
    terms = [gaussian(*shape, seed=i) for i in range(4)]
    (update, *_), alone = second_step(terms, shape, residual=rule, **both(bits, bits))
    if rule == "matched":
        mean = torch.stack(terms).mean(0)
        expected = alone.factors[:, None] * (mean - mean @ alone.basis @ alone.basis.T)
    else:
        expected = residual_of(alone)
    similarity = torch.nn.functional.cosine_similarity(
        residual_of(update).flatten(), expected.flatten(), dim=0
    )
    assert float(similarity) > closeness


@given(st.sampled_from([SMALL, LARGE]), st.integers(2, 4), st.integers(0, 50))
def test_the_energy_kept_is_that_of_the_mean(shape, processes, seed):
    layout, settings = shardings(*shape, processes), settings_of(residual="none", min_rank=4)
    states: list[State] = [{} for _ in layout]
    terms = [gaussian(*shape, seed=100 * seed + i) for i in range(processes)]
    update = step_together(terms, states, layout, settings)[0]
    mean = torch.stack(terms).mean(0)
    exact = float((mean @ update.basis).square().sum() / mean.square().sum())
    told = [state["energy"] for state in states]
    assert len(set(told)) == 1
    # probes tell the rest to 10 %
    assert told[0] == pytest.approx(exact, rel=1e-4 if shape == SMALL else 0.3)


def test_a_tensor_that_adam_trains_sums_its_terms():
    side = shard_elements(((0, 10),) * 3, 10, replicated=True, terms=True)
    terms = [whole_numbers(10, seed=i) for i in range(3)]
    states: list[State] = [{} for _ in terms]
    settings = settings_of()
    directions = run_lockstep(
        [
            adam_step(term, state, side, settings, me=me)
            for me, (term, state) in enumerate(zip(terms, states, strict=True))
        ]
    )
    total = torch.stack(terms).sum(0)
    assert all(torch.equal(each, directions[0]) for each in directions)
    assert torch.equal(directions[0].sign(), total.sign())
    ROUNDING.check(torch.cat([state["exp_avg"] for state in states]), 0.1 * total)


# -- copies of a model that is sharded itself -----------------------------------------------------


def copies(
    m: int, n: int, cuts: list[int], *, spans_columns: bool, home: int = 0
) -> list[MatrixSharding]:
    """A matrix of ``m x n`` elements, cut there in each of two copies."""
    bounds = [0, *sorted(cuts), m * n]
    ranges = tuple(pairwise(bounds)) * 2
    each = len(cuts) + 1
    layout = {"spans_columns": spans_columns, "home": home, "shard_basis": False}
    copy_of = (0,) * each + (1,) * each
    return [
        shard_matrix(m, n, ranges, me=me, replicated=False, copy_of=copy_of, **layout)
        for me in range(2 * each)
    ]


def part_of(matrix: Tensor, sharding: MatrixSharding) -> Tensor:
    """``moment.touch x basis.touch``: what a process holds of a matrix as stored, and zeros."""
    start, stop = sharding.elements.touch[sharding.me]
    held = torch.zeros(matrix.numel())
    held[start:stop] = matrix.reshape(-1)[start:stop]
    held = held.view(matrix.shape)
    held = held if sharding.cuts_moment else held.T
    moment, basis = (side.touch[sharding.me] for side in (sharding.moment, sharding.basis))
    return held[slice(*moment), slice(*basis)]


def step_of_copies(
    terms: list[Tensor],
    states: list[State],
    layout: list[MatrixSharding],
    settings: AdaRankGradConfig,
) -> tuple[list[LowRankUpdate | None], int]:
    """One step with a gradient in each copy, and its rounds; those without a part take none."""
    facts = StepFacts(
        name="w",
        norm_sq=sum(float(term.double().square().sum()) for term in terms) / len(terms),
        kept_sq=sum(float(state.get("kept_sq", 0.0)) for state in states),
        phase=0.0,
    )
    counts: list[int] = []
    steps = []
    for state, sharding in zip(states, layout, strict=True):
        part = part_of(terms[sharding.terms.copy_of[sharding.me]] / len(terms), sharding)
        own = step_of_terms(lambda part=part: part, CPU, state, sharding, settings, facts)
        steps.append(counted(own, counts))
    return run_lockstep(steps), max(counts)


def elements_of(update: LowRankUpdate, sharding: MatrixSharding) -> Tensor:
    """``elements.update``: what the weights held change by."""
    change = sharding.flat(update.direction @ update.basis.T)
    return change if update.outside is None else change + update.outside


ELEMENTS = 24 * 16
CUTS = st.lists(st.integers(1, ELEMENTS - 1), min_size=1, max_size=3, unique=True)


@given(CUTS, st.booleans(), st.integers(0, 3))
def test_copies_cut_anywhere_take_the_steps_of_the_mean(cuts, spans_columns, home):
    layout = copies(24, 16, cuts, spans_columns=spans_columns, home=home)
    settings = settings_of(residual="none")
    states: list[State] = [{} for _ in layout]
    alone: State = {}
    steady, refreshing = rounds_of_matrix(layout[0], settings)
    for step in range(4):
        common = gaussian(24, 2, seed=step // 3) @ gaussian(2, 16, seed=step // 3)
        terms = [common + 0.1 * gaussian(24, 16, seed=10 * step + i) for i in range(2)]
        updates, taken = step_of_copies(terms, states, layout, settings)
        mean = (terms[0] + terms[1]) / 2
        expected = change_of(one_step(mean if spans_columns else mean.T, alone, **dict(settings)))
        expected = (expected if spans_columns else expected.T).reshape(-1)
        assert taken <= (refreshing if step in (0, 3) else steady)
        for update, sharding in zip(updates, layout, strict=True):
            low, high = sharding.elements.update[sharding.me]
            ROUNDING.check(elements_of(update, sharding), expected[low:high])
    assert {state["rank"] for state in states} == {alone["rank"]}


@given(CUTS, st.booleans(), st.sampled_from([(1, 2), (2, 2), (4, 4)]), st.booleans())
def test_copies_are_equal_bit_by_bit(cuts, spans_columns, bits, remembers):
    layout = copies(24, 16, cuts, spans_columns=spans_columns)
    settings = settings_of(residual_momentum=0.5 * remembers, **both(*bits))
    states: list[State] = [{} for _ in layout]
    steady, refreshing = rounds_of_matrix(layout[0], settings)
    for step in range(4):
        terms = [gaussian(24, 16, seed=10 * step + i) for i in range(2)]
        updates, taken = step_of_copies(terms, states, layout, settings)
        changes = [elements_of(*each) for each in zip(updates, layout, strict=True)]
        each = len(layout) // 2
        assert all(map(torch.equal, changes[:each], changes[each:]))
        assert taken <= (refreshing if step in (0, 3) else steady)


def test_large_copies_are_sketched_in_the_rounds_agreed():
    settings = settings_of(residual="none")
    for spans_columns in (True, False):
        layout = copies(400, 24, [2000, 6005], spans_columns=spans_columns)
        states: list[State] = [{} for _ in layout]
        for step in range(2):
            terms = [gaussian(400, 24, seed=10 * step + i) for i in range(2)]
            _, taken = step_of_copies(terms, states, layout, settings)
            assert taken <= rounds_of_matrix(layout[0], settings)[step == 0]


def test_the_residual_of_sharded_copies_is_near_to_that_of_the_mean():
    layout, settings = copies(64, 96, [2000, 4000], spans_columns=True), settings_of(**both(4, 4))
    states: list[State] = [{} for _ in layout]
    alone: State = {}
    for step in range(2):
        terms = [gaussian(64, 96, seed=10 * (step > 0) + i * step) for i in range(2)]
        updates, _ = step_of_copies(terms, states, layout, settings)
        expected = change_of(one_step((terms[0] + terms[1]) / 2, alone, **dict(settings)))
    changes = [elements_of(*each) for each in zip(updates[:3], layout[:3], strict=True)]
    similarity = torch.nn.functional.cosine_similarity(
        torch.cat(changes), expected.reshape(-1), dim=0
    )
    assert float(similarity) > 0.95


@pytest.mark.parametrize("rule", ["none", "orthogonalized"])
@pytest.mark.parametrize("bits", [1, 2])
def test_a_process_without_a_part_sends_and_receives_nothing(rule, bits):
    ranges = ((0, 40), (40, 80), (80, 100), (100, 100)) * 2  # five rows of 20, by twos
    layout = {"spans_columns": False, "home": 1, "shard_basis": False, "replicated": False}
    sharding = shard_matrix(5, 20, ranges, me=0, copy_of=(0,) * 4 + (1,) * 4, **layout)
    settings = settings_of(residual=rule, residual_sync_bits=bits)
    state: State = {}
    for _ in range(2):
        for request in requests_of_a_step(state, sharding, settings, 2):
            for transfer in request:
                for rows in (transfer.have, transfer.want):
                    assert all(low >= high for low, high in (rows[3], rows[7]))
