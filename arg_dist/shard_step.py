"""One shard's step: its gradient in, the algorithm that fits it, its weights out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arg_dist.agreement import Agreement
from arg_dist.algorithm import LowRankUpdate, State, adam_step, low_rank_step
from arg_dist.config import AdaRankGradConfig
from arg_dist.sharding.shard import MatrixShard, Shard, TensorShard
from arg_dist.subspace.exchange import Steps


def oriented_gradient(shard: Shard) -> Tensor:
    """This process's part of a gradient, fp32; a missing one counts as zero under every engine."""
    gradient = shard.gradient()
    if gradient is None:
        values = shard.values()
        gradient = values.new_zeros(1, dtype=torch.float32).expand(values.shape)
    if isinstance(shard, MatrixShard):
        return shard.oriented_gradient(gradient)
    assert isinstance(shard, TensorShard)
    return shard.kept_gradient(gradient)


def computation(
    shard: Shard,
    gradient: Tensor,
    state: State,
    agreed: Agreement,
    settings: AdaRankGradConfig,
    *,
    allowed: int | None = None,
) -> Steps[Any]:
    """The algorithm on this shard: low-rank for matrices, Adam for the rest.

    `allowed` is the largest rank that a budget leaves to a matrix; None without one.
    """
    if isinstance(shard, MatrixShard):
        return low_rank_step(
            gradient,
            state,
            shard.spread,
            settings,
            name=shard.name,
            norm_sq=agreed.norm_sq[shard.unit],
            kept_sq=agreed.kept_sq[shard.unit],
            phase=shard.phase,
            allowed=allowed,
        )
    assert isinstance(shard, TensorShard)
    return adam_step(gradient, state, shard.side, settings, me=shard.me)


def apply_update(shard: Shard, update: Any, settings: AdaRankGradConfig) -> None:
    """Adds what the algorithm returned to the weights held; None changes nothing."""
    lr, weight_decay = settings.lr, settings.weight_decay
    if isinstance(update, LowRankUpdate):
        assert isinstance(shard, MatrixShard)
        direction, basis, factors = update
        gradient = None if factors is None else shard.gradient()
        residual = None if factors is None or gradient is None else (factors, gradient)
        shard.apply(
            direction, basis, residual, lr=lr, scale=settings.scale, weight_decay=weight_decay
        )
    elif update is not None:
        assert isinstance(shard, TensorShard)
        shard.apply(update, lr=lr, weight_decay=weight_decay)
