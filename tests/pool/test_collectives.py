"""Real collectives give to the bit what the lockstep driver gives."""

from __future__ import annotations

import pytest
import torch
from cuts import (
    cut_matrix,
    equal_pieces,
    ranges_of,
    whole_rows,
    without_bystanders,
)
from lockstep_steps import apply, step_in_lockstep, step_of
from matrices import gaussian

from arg_dist.config import AdaRankGradConfig
from arg_dist.recording import rounds
from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.drivers import run_collective
from arg_dist.subspace.distributed import Exchange

SHAPES = ((13, 10), (9, 14))
STEPS = 7
SETTINGS = AdaRankGradConfig(max_rank=5, min_rank=1, min_gap=3, max_gap=3)
KEPT = ("basis", "exp_avg", "exp_avg_sq")


def train(group, cuts, layout):
    """Trains both matrices together; returns weights and state of this process, and bytes sent."""
    communicator = Communicator(group)
    shards = [
        cut_matrix(gaussian(*shape), ranges, **layout)[communicator.me]
        for shape, ranges in zip(SHAPES, cuts, strict=True)
    ]
    states = [{} for _ in shards]
    for step in range(STEPS):
        held = [(i, shard) for i, shard in enumerate(shards) if shard.range[0] < shard.range[1]]
        mine = [float(state.get("kept_sq", 0.0)) for state in states]
        kept_sq = [sum(each) for each in zip(*communicator.gather_objects(mine), strict=True)]
        updates = run_collective(
            [
                step_of(shard, states[i], gaussian(*SHAPES[i], seed=step), SETTINGS, kept_sq[i])
                for i, shard in held
            ],
            communicator,
            max(rounds(SETTINGS.power_passes, SETTINGS.residual, relayed=True)),
        )
        for (i, shard), update in zip(held, updates, strict=True):
            apply(shard, update, gaussian(*SHAPES[i], seed=step), SETTINGS)
    kept = [{key: state[key] for key in KEPT} if state else None for state in states]
    return [shard.values() for shard in shards], kept, communicator.sent_bytes


def lockstep(shape, ranges, layout):
    """The same for one matrix, without processes: weights and states of those who hold a part."""
    shards = cut_matrix(gaussian(*shape), without_bystanders(ranges), **layout)
    states = [{} for _ in shards]
    for step in range(STEPS):
        step_in_lockstep(shards, states, gaussian(*shape, seed=step), SETTINGS)
    return [shard.values() for shard in shards], states


CUTS = {
    "rows": lambda shape, n: whole_rows(*shape, n),
    "pieces": lambda shape, n: equal_pieces(shape[0] * shape[1], n),
    "mostly on one": lambda shape, n: ranges_of([3] * (n - 1), shape[0] * shape[1]),
}


def assert_same(results, cuts, layout) -> None:
    """Asserts that weights and states have the same bits as without processes."""
    for i, (shape, ranges) in enumerate(zip(SHAPES, cuts, strict=True)):
        weights, states = lockstep(shape, ranges, layout)
        owners = [process for process, (start, stop) in enumerate(ranges) if start < stop]
        for process, weight, state in zip(owners, weights, states, strict=True):
            actual = (results[process][0][i], results[process][1][i])
            expected = (weight, {key: state[key] for key in KEPT})
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("spans_columns", [True, False])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_processes_compute_what_shards_in_lockstep_do(pool, cut, spans_columns, processes):
    cuts, layout = [cut(shape, processes) for shape in SHAPES], {"spans_columns": spans_columns}
    assert_same(pool.run(train, processes, cuts, layout), cuts, layout)


@pytest.mark.parametrize("shard_basis", [True, False])
def test_replicated_processes_compute_what_shards_in_lockstep_do(pool, shard_basis):
    layout = {"spans_columns": True, "replicated": True, "shard_basis": shard_basis}
    cuts = [((0, shape[0] * shape[1]),) * 3 for shape in SHAPES]
    assert_same(pool.run(train, 3, cuts, layout), cuts, layout)


def test_a_matrix_that_one_process_holds_whole_is_never_sent(pool):
    cuts = [((0, 130), (130, 130)), ((0, 0), (0, 126))]
    assert [sent for *_, sent in pool.run(train, 2, cuts, {"spans_columns": True})] == [0, 0]


def ask_too_often(group) -> str:
    def asking():
        everyone = ((0, 2),) * 2
        for _ in range(3):
            yield Exchange(torch.ones(2), everyone, everyone)

    with pytest.raises(RuntimeError) as raised:
        run_collective([asking()], Communicator(group), rounds=2)
    return str(raised.value)


def test_a_round_more_than_agreed_raises_on_every_process(pool):
    for message in pool.run(ask_too_often, 2):
        assert "1 computations still have requests after 2 rounds" in message


def send_mixed_types(group) -> list[list[float]]:
    communicator = Communicator(group)
    me, size = communicator.me, communicator.size
    everyone, own = ((0, 3),) * size, tuple((i, i + 1) for i in range(size))
    answers = communicator.exchange(
        [
            Exchange(torch.full((3,), me + 0.5, dtype=torch.float64), everyone, everyone),
            Exchange(torch.tensor([[me] * 5], dtype=torch.int64), own, ((0, size),) * size),
            Exchange(torch.full((3, 1), me, dtype=torch.bfloat16), everyone, own),
        ]
    )
    return [answer.flatten().tolist() for answer in answers]


def test_types_and_odd_sizes_share_a_message(pool):
    indices = [float(i) for i in range(3) for _ in range(5)]
    assert pool.run(send_mixed_types, 3) == [[[4.5] * 3, indices, [3.0]]] * 3
