"""One shard's step: read its gradient, run the matching algorithm, update its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from arg_dist.agreement import Agreement
from arg_dist.algorithm import (
    LowRankUpdate,
    StepFacts,
    adam_step,
    is_due,
    low_rank_step,
)
from arg_dist.config import AdaRankGradConfig
from arg_dist.recording import rounds
from arg_dist.sharding.drivers import run_local
from arg_dist.sharding.lanes import Lane
from arg_dist.sharding.shard import MatrixShard, Shard, TensorShard
from arg_dist.subspace.distributed import Steps
from arg_dist.subspace.norms import norm_sq, row_squares
from arg_dist.subspace.precision import matmul_precision
from arg_dist.subspace.range_finder import Part
from arg_dist.subspace.state import State


@dataclass(frozen=True)
class GradientPart:
    """This process's part of one gradient, with the norms that the processes exchange.

    Attributes:
        read: returns it in fp32, oriented as ``moment x basis`` (if it is not of a matrix, in the
            type of the moments); copies only if necessary.
        norm_sq: ``||G||^2`` of the part, an fp64 scalar.
        row_sq: ``moment.touch``, ``||G_i||^2`` of the part; None if it is not of a matrix.
    """

    read: Part
    norm_sq: Tensor
    row_sq: Tensor | None = None


def gradient_part(shard: Shard) -> GradientPart:
    """The gradient of a shard; a missing one counts as zero under every engine."""
    if isinstance(shard, MatrixShard):
        part = shard.oriented_gradient(_held_gradient(shard))
        squares = row_squares(part)
        total = norm_sq(part, squares)
        return GradientPart(partial(_oriented_gradient, shard), total, squares)
    assert isinstance(shard, TensorShard)
    total = norm_sq(shard.kept_gradient(_held_gradient(shard)))
    return GradientPart(partial(_kept_gradient, shard), total)


def _oriented_gradient(shard: MatrixShard) -> Tensor:
    return shard.oriented_gradient(_held_gradient(shard)).float()


def _kept_gradient(shard: TensorShard) -> Tensor:
    return shard.kept_gradient(_held_gradient(shard)).to(shard.moment_type)


def _held_gradient(shard: Shard) -> Tensor:
    gradient = shard.gradient()
    if gradient is None:
        values = shard.values()
        gradient = values.new_zeros(1, dtype=torch.float32).expand(values.shape)
    return gradient


def computation(
    shard: Shard,
    gradient: GradientPart,
    state: State,
    agreed: Agreement,
    settings: AdaRankGradConfig,
    *,
    turns: int | None = None,
    allowed: int | None = None,
) -> Steps[Any]:
    """The algorithm on this shard: AdaRankGrad for matrices, Adam for the rest.

    `turns` and `allowed` are as in :class:`arg_dist.algorithm.StepFacts`.
    """
    if isinstance(shard, MatrixShard):
        assert gradient.row_sq is not None
        facts = StepFacts(
            name=shard.name,
            norm_sq=agreed.norm_sq[shard.unit],
            kept_sq=agreed.kept_sq[shard.unit],
            phase=shard.phase,
            turns=turns,
            allowed=allowed,
        )
        return low_rank_step(gradient.read, gradient.row_sq, state, shard.sharding, settings, facts)
    assert isinstance(shard, TensorShard)
    return adam_step(gradient.read(), state, shard.sharding, settings, me=shard.me)


def rounds_of(shard: Shard, state: State, settings: Sequence[AdaRankGradConfig]) -> int:
    """Communication rounds that a shard's step may take."""
    if not shard.is_shared or not isinstance(shard, MatrixShard):
        return int(shard.is_shared)
    chosen, sharding = settings[shard.group], shard.sharding
    steady, refreshing = rounds(
        chosen.power_passes,
        chosen.residual,
        relayed=sharding.is_relayed,
        aligned=sharding.is_aligned,
    )
    return refreshing if is_due(state) else steady


def lane_of(
    shards: Sequence[Shard],
    steps: Callable[[Shard], Steps[Any]],
    settings: Sequence[AdaRankGradConfig],
) -> Lane[Any]:
    """Build a lane: shared shards communicate, and local shards step while messages are in flight.

    Args:
        shards: shards in an order equal on all processes.
        steps: creates a shard's computation; called when it begins.
        settings: settings of the parameter groups.
    """
    shared = [shard for shard in shards if shard.is_shared]

    def finish(position: int, update: Any) -> None:
        shard = shared[position]
        apply_update(shard, update, settings[shard.group])

    def step_alone() -> None:
        for shard in shards:
            if not shard.is_shared:
                apply_update(shard, run_local(steps(shard)), settings[shard.group])

    names = [shard.name for shard in shared]
    return Lane(map(steps, shared), finish, "the step", names, step_alone)


def apply_update(shard: Shard, update: Any, settings: AdaRankGradConfig) -> None:
    """Apply the algorithm's result to the weights held; None changes nothing."""
    lr, weight_decay = settings.lr, settings.weight_decay
    if isinstance(update, LowRankUpdate):
        assert isinstance(shard, MatrixShard)
        direction, basis, factors, outside = update
        gradient = None if factors is None else shard.gradient()
        residual = None if factors is None or gradient is None else (factors, gradient)
        with matmul_precision(settings.matmul_precision):
            shard.apply(
                direction,
                basis,
                residual,
                outside,
                lr=lr,
                scale=settings.scale,
                weight_decay=weight_decay,
            )
    elif update is not None:
        assert isinstance(shard, TensorShard)
        shard.apply(update, lr=lr * settings.full_rank_scale, weight_decay=weight_decay)
