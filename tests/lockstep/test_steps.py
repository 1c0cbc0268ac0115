"""Steps on a matrix cut over many shards, against the matrix in one piece."""

from __future__ import annotations

import copy

import pytest
import torch
from cuts import (
    cut_matrix,
    element_ranges,
    equal_pieces,
    part_of,
    put_together,
    ranges_of,
    weight_of,
    whole_rows,
    without_bystanders,
)
from hypothesis import given
from hypothesis import strategies as st
from lockstep_steps import counted, step_in_lockstep, step_of
from matrices import changing_spectrum, gaussian, whole_numbers
from tolerances import (
    CODES,
    CODES_WEIGHTS,
    ORTHONORMAL,
    REDUCTION_ORDER,
    REDUCTION_ORDER_WEIGHTS,
    ROUNDING,
)

from arg_dist.config import AdaRankGradConfig
from arg_dist.sharding.drivers import run_lockstep
from arg_dist.subspace.distributed import Exchange

ROWS, COLUMNS, RANK = 7, 6, 3
SHAPE = (ROWS, COLUMNS)
WHOLE = ((0, ROWS * COLUMNS),)

cut_ranges = element_ranges(ROWS * COLUMNS).map(without_bystanders)
RULES = [{"residual": rule} for rule in ("none", "scaled", "matched", "orthogonalized")]
RULES += [{"residual_momentum": 0.9}, {"state_dtype": "bf16"}, {"state_dtype": "int8"}]
residuals = st.sampled_from(RULES)
layouts = st.fixed_dictionaries({"spans_columns": st.booleans(), "shard_basis": st.booleans()})


def signed_permutation(size: int, width: int) -> torch.Tensor:
    """An orthonormal basis of whole numbers."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(3))[:width]
    return torch.eye(size)[:, order] * torch.tensor([1.0, -1.0, 1.0])[:width]


def state_in_parts(shards) -> list[dict]:
    """A state of whole numbers in the middle of training, each shard's part of it."""
    states = []
    for shard in shards:
        sharding, me = shard.sharding, shard.sharding.me
        basis, moments = sharding.basis.size, sharding.moment.size
        kept = slice(*sharding.moment.keep[me])
        states.append(
            {
                "basis": signed_permutation(basis, RANK)[slice(*sharding.store[me])],
                "exp_avg": whole_numbers(moments, RANK, seed=4)[kept],
                "exp_avg_sq": whole_numbers(moments, RANK, seed=5).square()[kept],
                "kept_sq": torch.tensor(1.0 if me == 0 else 0.0).double(),
                **{"rank": RANK, "step": 7, "refreshes": 1, "since_refresh": 7, "gap": 99},
                **{"energy": 0.9, "kept_sq_at_refresh": 1.0},
            }
        )
    return states


@given(cut_ranges, layouts, st.booleans())
def test_a_steady_step_of_whole_numbers_is_that_of_the_whole(ranges, layout, replicated):
    results = []
    for cut, everywhere in ((WHOLE, False), (ranges, replicated)):
        shards = cut_matrix(gaussian(*SHAPE), cut, replicated=everywhere, **layout)
        states = state_in_parts(shards)
        gradient = whole_numbers(*SHAPE, seed=1)
        results.append((shards, states, step_in_lockstep(shards, states, gradient, settings())))
    (_, (expected,), (whole,)), (shards, states, updates) = results
    moment, basis = shards[0].sharding.moment, shards[0].sharding.basis
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(put_together([s[key] for s in states], moment.keep), expected[key])
    for me, update in enumerate(updates):
        assert torch.equal(update.direction, whole.direction[slice(*moment.update[me])])
        assert torch.equal(update.basis, whole.basis[slice(*basis.touch[me])])
    assert sum(float(state["kept_sq"]) for state in states) == float(expected["kept_sq"])


def settings(**changes) -> AdaRankGradConfig:
    defaults = {
        "max_rank": 5,
        "min_rank": 1,
        "energy": 0.95,
        "lr": 1e-2,
        "weight_decay": 0.1,
        "hysteresis": 0.0,
    }
    return AdaRankGradConfig(**{**defaults, **changes})


FREQUENT = settings(min_gap=3, max_gap=6)


def trained(ranges, replicated=False, config=FREQUENT, shape=SHAPE, **layout):
    """Losses, ranks, shards and states of 20 steps with refreshes and rank changes."""
    goal, losses, ranks = gaussian(*shape, seed=9), [], []
    shards = cut_matrix(torch.zeros(shape), ranges, replicated=replicated, **layout)
    states = [{} for _ in shards]
    for direction in changing_spectrum(*shape, (0.9, 0.4, 0.8, 0.5), each=5):
        weight = weight_of(shards)
        # a changing problem, so that the energies change too
        step_in_lockstep(shards, states, direction * (1 + 0.1 * (weight - goal)), config)
        losses.append(float((weight_of(shards) - goal).square().mean()))
        ranks.append([state["rank"] for state in states])
    return losses, ranks, shards, states


def is_in_codes(config):
    """Whether something of the state has few bits, so that roundings may fall apart."""
    return bool(config.residual_momentum) or config.state_dtype != "fp32"


def check_against_the_whole(ranges, replicated=False, config=FREQUENT, **layout):
    losses, ranks, shards, _ = trained(WHOLE, config=config, **layout)
    assert len({rank for (rank,) in ranks}) > 2
    cut_losses, cut_ranks, cut_shards, _ = trained(ranges, replicated, config, **layout)
    in_codes = is_in_codes(config)
    of_losses = CODES if in_codes else REDUCTION_ORDER
    of_losses.check(torch.tensor(cut_losses), torch.tensor(losses))
    assert cut_ranks == [[rank] * len(cut_shards) for (rank,) in ranks]
    of_weights = CODES_WEIGHTS if in_codes else REDUCTION_ORDER_WEIGHTS
    of_weights.check(weight_of(cut_shards), weight_of(shards))


@given(cut_ranges, layouts, residuals)
def test_training_in_shards_is_training_in_one_piece(ranges, layout, residual):
    config = FREQUENT.model_copy(update=residual)
    check_against_the_whole(ranges, config=config, **layout)


@pytest.mark.parametrize("spans_columns", [True, False])
@pytest.mark.parametrize("processes", [2, 3, 4, 8])
@pytest.mark.parametrize("residual", RULES, ids=str)
def test_replicated_training_is_shared_out_without_a_difference(processes, spans_columns, residual):
    config = FREQUENT.model_copy(update=residual)
    cuts = WHOLE * processes
    check_against_the_whole(cuts, True, config, spans_columns=spans_columns)


NAMED_CUTS = {
    "rows cut in the middle": ranges_of([9, 21, 33], 42),
    "one row over three shards": ranges_of([14, 16], 42),
    "all on one shard": ranges_of([42, 42], 42),
    "whole rows, some shards empty": whole_rows(ROWS, COLUMNS, 5),
    "equal pieces": equal_pieces(42, 4),
    "one element a shard": ranges_of(range(1, 42), 42),
}


@pytest.mark.parametrize("spans_columns", [True, False])
@pytest.mark.parametrize("ranges", NAMED_CUTS.values(), ids=NAMED_CUTS)
def test_cuts_as_engines_make_them(ranges, spans_columns):
    check_against_the_whole(without_bystanders(ranges), spans_columns=spans_columns)


@given(cut_ranges, layouts, st.booleans())
def test_state_is_held_once_and_no_view_holds_more(ranges, layout, replicated):
    *_, states = trained(ranges, replicated, **layout)
    *_, (whole,) = trained(WHOLE, **layout)
    keys = ["exp_avg", "exp_avg_sq"] + ["basis"] * layout["shard_basis"]
    for key in keys:
        assert sum(state[key].numel() for state in states) == whole[key].numel()
    for state in states:
        for key in ("basis", "exp_avg", "exp_avg_sq"):
            assert state[key].untyped_storage().nbytes() == state[key].nbytes
    assert len({(s["step"], s["refreshes"], s["gap"], s["energy"]) for s in states}) == 1


@given(cut_ranges, st.booleans())
def test_bases_are_equal_on_all_shards_and_orthonormal(ranges, spans_columns):
    layout = {"spans_columns": spans_columns}
    *_, shards, states = trained(ranges, shard_basis=True, **layout)
    basis = put_together([state["basis"] for state in states], shards[0].sharding.store)
    rank = states[0]["rank"]
    ORTHONORMAL.check(basis.T @ basis, torch.eye(rank))
    *_, shards, states = trained(ranges, shard_basis=False, **layout)
    for shard, state in zip(shards, states, strict=True):
        assert torch.equal(state["basis"], basis[slice(*shard.sharding.store[shard.sharding.me])])


def bystander(requests: int):
    """A process that holds nothing of the matrix, and only goes along with the others."""
    nothing = Exchange(torch.zeros(0, 0), ((0, 0),) * 9, ((0, 0),) * 9)
    for _ in range(requests):
        yield nothing


@pytest.mark.parametrize("spans_columns", [True, False])
def test_processes_that_hold_nothing_make_no_difference(spans_columns):
    gradient, ranges = gaussian(*SHAPE), ranges_of([0, 13, 13, 30, 42], 42)
    counts, results = [], []
    for cut in (without_bystanders(ranges), ranges):
        shards = cut_matrix(gaussian(*SHAPE), cut, spans_columns=spans_columns, home=1)
        states = [{} for _ in shards]
        updates = run_lockstep(
            [
                counted(step_of(shard, state, gradient, FREQUENT), counts)
                if len(part_of(gradient, shard))
                else bystander(counts[0])
                for shard, state in zip(shards, states, strict=True)
            ]
        )
        results.append([(u, s) for u, s in zip(updates, states, strict=True) if u is not None])
    for (expected, whole), (actual, part) in zip(*results, strict=True):
        assert all(map(torch.equal, actual[:2], expected[:2]))
        assert torch.equal(part["exp_avg_sq"], whole["exp_avg_sq"])


@given(cut_ranges, st.booleans(), residuals)
def test_a_saved_shard_goes_on_to_the_bit(ranges, spans_columns, residual):
    config = FREQUENT.model_copy(update=residual)
    shards = cut_matrix(gaussian(*SHAPE), ranges, spans_columns=spans_columns)
    states = [{} for _ in shards]
    for seed in range(4):
        step_in_lockstep(shards, states, gaussian(*SHAPE, seed=seed), config)
    saved = copy.deepcopy(states)
    ends = [
        step_in_lockstep(shards, each, gaussian(*SHAPE, seed=5), config) for each in (states, saved)
    ]
    for first, second in zip(*ends, strict=True):
        for one, other in zip(first, second, strict=True):
            assert one is other is None or torch.equal(one, other)


def test_a_transposed_matrix_is_the_same_problem_with_the_sides_swapped():
    results = []
    for shape, spans_columns in (((7, 6), True), ((6, 7), False)):
        layout = {"spans_columns": spans_columns, "transposed": not spans_columns}
        shards = cut_matrix(torch.zeros(shape), WHOLE, **layout)
        gradient = gaussian(7, 6) if spans_columns else gaussian(7, 6).T.contiguous()
        states = [{}]
        for _ in range(4):
            step_in_lockstep(shards, states, gradient, FREQUENT)
        results.append(weight_of(shards))
    ROUNDING.check(results[1].T, results[0])
