"""Steps of the algorithm on many shards inside this process."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from cuts import part_of
from torch import Tensor

from arg_dist.algorithm import LowRankUpdate, State, StepFacts, low_rank_step
from arg_dist.config import AdaRankGradConfig
from arg_dist.sharding.drivers import run_lockstep
from arg_dist.sharding.shard import MatrixShard
from arg_dist.step import Updates
from arg_dist.subspace.distributed import Request, Steps, exchanges_of
from arg_dist.subspace.norms import row_squares


def step_of(
    shard: MatrixShard,
    state: State,
    gradient: Tensor,
    settings: AdaRankGradConfig,
    kept_sq: float = 0.0,
    stagger: int | None = None,
) -> Steps[LowRankUpdate | None]:
    """A shard's part of one step on the whole `gradient`."""
    part = shard.oriented_gradient(part_of(gradient, shard))
    facts = StepFacts(
        name=shard.name,
        norm_sq=float(gradient.double().square().sum()),
        kept_sq=kept_sq,
        phase=shard.phase,
        stagger=stagger,
    )
    return low_rank_step(lambda: part, row_squares(part), state, shard.sharding, settings, facts)


def step_in_lockstep(
    shards: Sequence[MatrixShard],
    states: Sequence[State],
    gradient: Tensor,
    settings: AdaRankGradConfig,
    stagger: int | None = None,
) -> list[LowRankUpdate | None]:
    """One step of all shards, on their weights and states."""
    kept_sq = sum(float(state.get("kept_sq", 0.0)) for state in states)
    updates = run_lockstep(
        [
            step_of(shard, state, gradient, settings, kept_sq, stagger)
            for shard, state in zip(shards, states, strict=True)
        ]
    )
    for shard, update in zip(shards, updates, strict=True):
        apply(shard, update, gradient, settings)
    return updates


def apply(
    shard: MatrixShard, update: LowRankUpdate | None, gradient: Tensor, settings: AdaRankGradConfig
) -> None:
    """Apply an update to the weights of a shard, of which the whole `gradient` is given."""
    target = shard.fragment.target
    target.grad = torch.zeros_like(target)
    held = shard.gradient()
    held.copy_(part_of(gradient, shard).view(held.shape))
    Updates().add(shard, update, settings)


def heard(steps: Steps[Any], hear: Callable[[Request], Any]) -> Generator[Any, Any, Any]:
    """The same computation; `hear` is called with each request before it is made."""
    answer = None
    while True:
        try:
            request = steps.send(answer)
        except StopIteration as finished:
            return finished.value
        if exchanges_of(request):  # else it is work
            hear(request)
        answer = yield request


def counted(steps: Steps[Any], counts: list[int]) -> Generator[Any, Any, Any]:
    """The same computation, which appends to `counts` how many requests it has made."""
    requests: list[Request] = []
    result = yield from heard(steps, requests.append)
    counts.append(len(requests))
    return result
