"""Recorded steps request what real ones do, and what they allocate is counted until it is freed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cuts import cut_matrix
from lockstep_steps import heard, step_of
from matrices import gaussian

from arg_dist.config import parse_config
from arg_dist.planning.allocations import Allocations
from arg_dist.recording import requests_of_a_step
from arg_dist.sharding.drivers import run_lockstep
from arg_dist.subspace.distributed import exchanges_of

UNEVEN = ((0, 13), (13, 40), (40, 71), (71, 120))
RULES = ["orthogonalized", "matched", "scaled", "none"]


def transfers(request: Any) -> Any:
    """What a request transfers; None for the bytes of rows that this process does not have."""
    return tuple((e.have, e.want, e.part[:1].nbytes or None) for e in exchanges_of(request))


def agrees(told: Any, made: Any) -> bool:
    """Whether a recorded request is one that was made; without rows, nobody sees their bytes."""
    return len(told) == len(made) and all(
        a[:2] == b[:2] and b[2] in (None, a[2]) for a, b in zip(told, made, strict=True)
    )


@pytest.mark.parametrize("residual", RULES)
@pytest.mark.parametrize("spans_columns", [True, False])
def test_every_process_records_what_all_of_them_request(residual, spans_columns):
    settings = parse_config(
        {"residual": residual, "max_rank": 4, "min_rank": 4, "min_gap": 2, "max_gap": 2}
    )
    shards = cut_matrix(gaussian(12, 10), UNEVEN, spans_columns=spans_columns, home=2)
    states: list[dict[str, Any]] = [{} for _ in shards]
    recorded: list[dict[str, Any]] = [{} for _ in shards]
    for step in range(3):  # the first basis, that basis, and another one
        made: list[list[Any]] = [[] for _ in shards]
        gradient = gaussian(12, 10, seed=step)
        run_lockstep(
            [
                heard(step_of(shard, state, gradient, settings), mine.append)
                for shard, state, mine in zip(shards, states, made, strict=True)
            ]
        )
        for me, shard in enumerate(shards):
            sharding = replace(shard.sharding, me=me)
            told = requests_of_a_step(recorded[me], sharding, settings, rank=4)
            assert len(told) == len(made[me])
            assert all(map(agrees, told, map(transfers, made[me])))


def test_storages_are_counted_until_they_are_freed():
    known = torch.empty(8, dtype=torch.float32, device="meta")
    with Allocations([known]) as allocations:
        view = known[2:].mul_(2)  # of a storage that was there
        made = known + 1
        number = allocations.number_of(made)
        del made, view
        matrix = torch.empty(3, 2, dtype=torch.float32, device="meta")
        product = torch.addmm(matrix[:, :1].expand(3, 3), matrix, matrix.T)
    assert product.shape == (3, 3)
    assert allocations.log[:2] == [(number, 32), (number, -32)]
    assert [size for _, size in allocations.log[2:]] == [24, 36]
