"""A matrix of which each process holds a block of rows and columns, against the whole matrix."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuts import (
    block_grids,
    cut_in_blocks,
    cut_matrix,
    held_blocks,
    part_of,
    put_together,
    weight_of,
)
from hypothesis import given
from hypothesis import strategies as st
from lockstep_steps import counted, step_in_lockstep, step_of
from matrices import changing_spectrum, gaussian, whole_numbers
from test_steps import (
    FREQUENT,
    RULES,
    SHAPE,
    WHOLE,
    is_in_codes,
    layouts,
    settings,
    state_in_parts,
    trained,
)
from tolerances import CODES, CODES_WEIGHTS, REDUCTION_ORDER, REDUCTION_ORDER_WEIGHTS

from arg_dist.recording import rounds_of_matrix
from arg_dist.sharding.blocks import own_boxes, shard_blocks, shard_boxes
from arg_dist.sharding.drivers import run_lockstep
from arg_dist.subspace.distributed import even_rows

grids = block_grids(*SHAPE).map(held_blocks)


@given(block_grids(*SHAPE), layouts)
def test_every_row_and_element_is_kept_once_by_a_process_that_touches_it(blocks, layout):
    sharding = shard_blocks(*SHAPE, blocks, me=0, home=0, **layout)
    for side in (sharding.moment, sharding.basis, sharding.elements):
        rows = [row for low, high in side.keep for row in range(low, high)]
        assert sorted(rows) == list(range(side.size))
        for (low, high), (first, last) in zip(side.keep, side.touch, strict=True):
            assert low >= high or first <= low <= high <= last
        for (low, high), (first, last) in zip(side.touch, side.update, strict=True):
            assert low >= high or first <= low <= high <= last


@given(block_grids(*SHAPE), st.booleans())
def test_elements_in_blocks_and_the_matrix_are_each_others_inverse(blocks, spans_columns):
    sharding = shard_blocks(
        *SHAPE, blocks, me=0, home=0, spans_columns=spans_columns, shard_basis=True
    )
    matrix = gaussian(sharding.moment.size, sharding.basis.size)
    assert torch.equal(sharding.matrix(sharding.flattened(matrix)), matrix)


@given(grids, layouts)
def test_a_steady_step_of_whole_numbers_is_that_of_the_whole(blocks, layout):
    gradient = whole_numbers(*SHAPE, seed=1)
    shards = cut_in_blocks(gaussian(*SHAPE), blocks, **layout)
    alone = cut_matrix(gaussian(*SHAPE), WHOLE, **layout)
    states, (expected,) = state_in_parts(shards), state_in_parts(alone)
    updates = step_in_lockstep(shards, states, gradient, settings())
    (whole,) = step_in_lockstep(alone, [expected], gradient, settings())
    moment, basis = shards[0].sharding.moment, shards[0].sharding.basis
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(put_together([s[key] for s in states], moment.keep), expected[key])
    for me, update in enumerate(updates):
        assert torch.equal(update.direction, whole.direction[slice(*moment.update[me])])
        assert torch.equal(update.basis, whole.basis[slice(*basis.touch[me])])
    for shard in shards:
        weights = part_of(weight_of(alone), shard)
        REDUCTION_ORDER_WEIGHTS.check(shard.values().view(-1), weights)


def trained_in_blocks(blocks, config, **layout):
    """Losses, ranks, shards and states of 20 steps with refreshes and rank changes."""
    goal, losses, ranks = gaussian(*SHAPE, seed=9), [], []
    shards = cut_in_blocks(torch.zeros(SHAPE), blocks, **layout)
    states = [{} for _ in shards]
    for direction in changing_spectrum(*SHAPE, (0.9, 0.4, 0.8, 0.5), each=5):
        gradient = direction * (1 + 0.1 * (weight_of(shards) - goal))
        step_in_lockstep(shards, states, gradient, config)
        losses.append(float((weight_of(shards) - goal).square().mean()))
        ranks.append([state["rank"] for state in states])
    return losses, ranks, shards, states


@given(grids, layouts, st.sampled_from(RULES))
def test_training_in_blocks_is_training_in_one_piece(blocks, layout, rule):
    config = FREQUENT.model_copy(update=rule)
    losses, ranks, shards, whole = trained(WHOLE, config=config, **layout)
    cut_losses, cut_ranks, cut_shards, states = trained_in_blocks(blocks, config, **layout)
    in_codes = is_in_codes(config)
    (CODES if in_codes else REDUCTION_ORDER).check(torch.tensor(cut_losses), torch.tensor(losses))
    assert cut_ranks == [[rank] * len(cut_shards) for (rank,) in ranks]
    of_weights = CODES_WEIGHTS if in_codes else REDUCTION_ORDER_WEIGHTS
    of_weights.check(weight_of(cut_shards), weight_of(shards))
    for key in ["exp_avg", "exp_avg_sq"] + ["basis"] * layout["shard_basis"]:
        assert sum(state[key].numel() for state in states) == whole[0][key].numel()


@given(grids, layouts, st.sampled_from(RULES))
def test_a_step_stays_within_its_rounds(blocks, layout, rule):
    config = settings(min_gap=2, max_gap=2, max_rank=3, **rule)
    shards = cut_in_blocks(gaussian(*SHAPE), blocks, **layout)
    states = [{} for _ in shards]
    most = [rounds_of_matrix(shard.sharding, config) for shard in shards]
    for number, is_refreshing in enumerate((True, False, True)):
        counts: list[int] = []
        gradient = gaussian(*SHAPE, seed=number)
        steps = [step_of(*each, gradient, config) for each in zip(shards, states, strict=True)]
        run_lockstep([counted(each, counts) for each in steps])
        assert set(counts) <= set(range(most[0][is_refreshing] + 1))
    assert len(set(most)) == 1


@given(st.data(), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_the_boxes_that_processes_answer_for_are_the_parts_that_they_keep(data, shape):
    axes = [data.draw(st.integers(1, 3)) for _ in shape]
    cuts = [even_rows(size, parts) for size, parts in zip(shape, axes, strict=True)]
    holders = data.draw(st.integers(1, 3))
    held = [box for box in itertools.product(*cuts) for _ in range(holders)]
    boxes = tuple(zip(*held, strict=True))
    sharding, times = shard_boxes("w", tuple(shape), boxes), torch.zeros(shape)
    for me, (own, box) in enumerate(zip(own_boxes(boxes), held, strict=True)):
        times[tuple(slice(*bounds) for bounds in own)] += 1
        numbers = torch.arange(*sharding.update[me]).view([b - a for a, b in box])
        relative = [slice(a - c, b - c) for (a, b), (c, _) in zip(own, box, strict=True)]
        assert numbers[tuple(relative)].flatten().tolist() == list(range(*sharding.keep[me]))
    assert (times == 1).all()


def test_blocks_that_are_no_grid_are_refused():
    blocks = (((0, 7), (0, 3)), ((0, 4), (3, 6)), ((4, 7), (2, 6)))
    with pytest.raises(RuntimeError, match="not those of a grid"):
        shard_blocks(*SHAPE, blocks, me=0, spans_columns=True, home=0, shard_basis=True)
    with pytest.raises(RuntimeError, match="not those of a grid"):
        shard_blocks(*SHAPE, blocks[:2], me=0, spans_columns=True, home=0, shard_basis=True)
