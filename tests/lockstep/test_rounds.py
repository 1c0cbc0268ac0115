"""No step asks more often than the processes have agreed to answer."""

from __future__ import annotations

import pytest
import torch
from cuts import cut_matrix, element_ranges, without_bystanders
from hypothesis import given
from hypothesis import strategies as st
from lockstep_steps import counted, step_of
from matrices import gaussian

from arg_dist.algorithm import adam_step
from arg_dist.config import AdaRankGradConfig
from arg_dist.recording import rounds_of_matrix
from arg_dist.sharding.drivers import run_lockstep
from arg_dist.sharding.layout import shard_elements

SHAPES = ((7, 5), (5, 7), (6, 6))


def requests_of_a_step(shards, states, gradient, settings) -> int:
    """How often each shard asks, which is the same for all."""
    counts: list[int] = []
    run_lockstep(
        [
            counted(step_of(shard, state, gradient, settings), counts)
            for shard, state in zip(shards, states, strict=True)
        ]
    )
    assert len(set(counts)) == 1
    return counts[0]


@given(
    st.sampled_from(SHAPES),
    st.data(),
    st.fixed_dictionaries(
        {key: st.booleans() for key in ("spans_columns", "shard_basis", "replicated")}
    ),
    st.integers(0, 3),
    st.sampled_from(["squared", "none"]),
    st.sampled_from(["orthogonalized", "matched", "scaled", "none"]),
)
def test_a_step_on_a_matrix_stays_within_its_rounds(
    shape, data, layout, power_passes, transport, residual
):
    ranges = without_bystanders(data.draw(element_ranges(shape[0] * shape[1])))
    shards = cut_matrix(gaussian(*shape), ranges, **layout)
    states = [{} for _ in shards]
    settings = AdaRankGradConfig(
        max_rank=3,
        min_rank=1,
        min_gap=2,
        max_gap=2,
        power_passes=power_passes,
        transport=transport,
        residual=residual,
    )
    steady, refreshing = rounds_of_matrix(shards[0].sharding, settings)
    for step in range(4):
        asked = requests_of_a_step(shards, states, gaussian(*shape, seed=step), settings)
        assert asked <= (refreshing if step in (0, 2) else steady)
        assert len(shards) > 1 or asked == 0


CUTS = {
    "anywhere": ((0, 13), (13, 22), (22, 35)),
    "anywhere, in two": ((0, 13), (13, 35)),
    "between rows": ((0, 10), (10, 20), (20, 35)),
    "between rows, in two": ((0, 20), (20, 35)),
}


@pytest.mark.parametrize("residual", ["orthogonalized", "matched", "scaled", "none"])
@pytest.mark.parametrize("spans_columns", [True, False])
@pytest.mark.parametrize("shard_basis", [True, False])
@pytest.mark.parametrize("ranges", CUTS.values(), ids=CUTS)
def test_a_cut_matrix_needs_all_rounds_of_the_agreement(
    ranges, shard_basis, spans_columns, residual
):
    layout = {"spans_columns": spans_columns, "shard_basis": shard_basis}
    check_rounds(cut_matrix(gaussian(7, 5), ranges, **layout), residual)


@pytest.mark.parametrize("residual", ["orthogonalized", "matched", "scaled", "none"])
@pytest.mark.parametrize("processes", [2, 3])
def test_a_replicated_matrix_needs_all_rounds_of_the_agreement(processes, residual):
    ranges = ((0, 35),) * processes
    check_rounds(cut_matrix(gaussian(7, 5), ranges, spans_columns=True, replicated=True), residual)


def check_rounds(shards, residual: str) -> None:
    states = [{} for _ in shards]
    settings = AdaRankGradConfig(max_rank=3, min_rank=1, min_gap=2, max_gap=2, residual=residual)
    asked = [
        requests_of_a_step(shards, states, gaussian(7, 5, seed=step), settings) for step in range(3)
    ]
    assert (asked[1], asked[2]) == rounds_of_matrix(shards[0].sharding, settings)


@given(element_ranges(11), st.booleans())
def test_adam_asks_once_at_most(ranges, replicated):
    if replicated:
        ranges = ((0, 11),) * len(ranges)
    side, counts = shard_elements(ranges, 11, replicated), []
    run_lockstep(
        [
            counted(
                adam_step(torch.ones(11)[slice(*kept)], {}, side, AdaRankGradConfig(), me=me),
                counts,
            )
            for me, kept in enumerate(side.keep)
        ]
    )
    assert set(counts) == {int(side.keep != side.update)} or len(ranges) == 1
