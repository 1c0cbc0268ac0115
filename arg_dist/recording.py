"""The algorithm recorded: the requests of a step, from running it on tensors without data.

The number of rounds, and every byte that ``arg-dist plan`` predicts, follow from here, so that the
order of requests stands in :mod:`arg_dist.algorithm` alone.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from arg_dist.algorithm import (
    Choice,
    LowRankUpdate,
    StepFacts,
    adam_step,
    low_rank_step,
    refresh_next,
)
from arg_dist.config import AdaRankGradConfig, parse_config
from arg_dist.sharding.drivers import Round, run_recorded
from arg_dist.sharding.layout import shard_matrix
from arg_dist.subspace.distributed import DimensionSharding, MatrixSharding, even_rows, row_count
from arg_dist.subspace.range_finder import Part
from arg_dist.subspace.residual import Rule
from arg_dist.subspace.state import State
from arg_dist.terms import is_small, step_of_terms

ROWS, COLUMNS, RANK = 7, 5, 3
"""A matrix of which every part that processes may share is split between three of them."""
UNEVEN = {2: ((0, 1), (1, ROWS)), 3: ((0, 1), (1, 2), (2, ROWS))}
"""Rows of two and three processes that are not their even shares."""


def recorded_step(
    gradient: Part,
    row_sq: Tensor,
    state: State,
    sharding: MatrixSharding,
    settings: AdaRankGradConfig,
    rank: int,
) -> Generator[Round, None, LowRankUpdate | None]:
    """One step of AdaRankGrad on one matrix; yields what each of its requests transfers.

    Args:
        gradient: the part of the gradient of the process ``sharding.me``, on the meta device.
        row_sq: ``moment.touch``, fp32, on the meta device.
        state: the matrix's state from previous recorded steps, updated; empty before the first.
        sharding: how the matrix is distributed over the processes.
        settings: the settings of its parameter group.
        rank: rank of the bases that refreshes find.
    """
    facts = StepFacts("", norm_sq=1.0, kept_sq=1.0, phase=0.0)

    def choose(*_: Any) -> Choice:
        return Choice(rank, 1.0)

    if sharding.terms is not None:
        device = row_sq.device
        steps = step_of_terms(gradient, device, state, sharding, settings, facts, choose=choose)
    else:
        steps = low_rank_step(gradient, row_sq, state, sharding, settings, facts, choose=choose)
    return run_recorded(steps, sharding.me)


def requests_of_a_step(
    state: State, sharding: MatrixSharding, settings: AdaRankGradConfig, rank: int
) -> list[Round]:
    """What the requests of :func:`recorded_step` transfer, with a gradient of fp32."""
    rows, columns = (
        row_count(side.touch[sharding.me]) for side in (sharding.moment, sharding.basis)
    )
    part = torch.empty(rows, columns, dtype=torch.float32, device="meta")
    row_sq = part.new_empty(rows)
    return list(recorded_step(lambda: part, row_sq, state, sharding, settings, rank))


def requests_of_adam(side: DimensionSharding, settings: AdaRankGradConfig) -> list[Round]:
    """What the requests of a step of Adam on a tensor in fp32 transfer."""
    gradient = torch.empty(row_count(side.touch[0]), dtype=torch.float32, device="meta")
    return list(run_recorded(adam_step(gradient, {}, side, settings, me=0), me=0))


def rounds_of_matrix(sharding: MatrixSharding, settings: AdaRankGradConfig) -> tuple[int, int]:
    """:func:`rounds` of a matrix that several processes share."""
    if sharding.blocks:
        return _counted(sharding, _smallest(settings.power_passes, settings.residual))
    terms = sharding.terms
    several = terms is not None and terms.count > 1
    return rounds(
        settings.power_passes,
        settings.residual,
        relayed=sharding.is_relayed,
        replicated=sharding.is_replicated,
        cuts_moment=sharding.cuts_moment,
        whole_rows=sharding.is_cut_in_whole_rows,
        in_shares=sharding.is_cut_in_shares,
        stored_once=sharding.is_stored_once,
        terms=several,
        formed=several and is_small(sharding, settings),
        pieces=several and terms is not None and terms.averaged is None,
    )


@lru_cache
def rounds(
    power_passes: int,
    residual: Rule,
    *,
    relayed: bool = False,
    replicated: bool = False,
    cuts_moment: bool = True,
    whole_rows: bool = False,
    in_shares: bool = False,
    stored_once: bool = True,
    terms: bool = False,
    formed: bool = False,
    pieces: bool = False,
) -> tuple[int, int]:
    """Number of sequential requests of a step, without and with a refresh.

    Every process of the group takes part in that many rounds, including those without a part of
    the matrix; the driver raises if a step makes more requests. They are counted on a small matrix
    that is cut in the same way.

    Args:
        power_passes: power passes of the randomized SVD.
        residual: rule of the residual.
        relayed: :attr:`arg_dist.subspace.distributed.MatrixSharding.is_relayed` of the matrix.
        replicated: ``is_replicated`` of it.
        cuts_moment: ``cuts_moment`` of it.
        whole_rows: ``is_cut_in_whole_rows`` of it.
        in_shares: ``is_cut_in_shares`` of it.
        stored_once: ``is_stored_once`` of it.
        terms: whether the gradient is a mean of terms.
        formed: whether it is so small that a refresh forms it, :func:`arg_dist.terms.is_small`.
        pieces: whether each term is itself sharded, over the processes of a copy of the model.
    """
    processes = 3 if relayed else 2
    rows, columns = ROWS, COLUMNS
    if terms and not formed:  # so large that sketches are smaller
        rows = 4 * RANK * (1 + power_passes) + 1
        columns = rows - 1
    copy_of = None
    if replicated:
        ranges = ((0, rows * columns),) * processes
    elif whole_rows:
        cuts = even_rows(rows, processes) if in_shares else UNEVEN[processes]
        ranges = tuple((low * columns, high * columns) for low, high in cuts)
    else:
        ranges = even_rows(rows * columns, processes)
    if pieces:
        ranges, copy_of = ranges * 2, (0,) * processes + (1,) * processes
    sharding = shard_matrix(
        rows,
        columns,
        ranges,
        me=0,
        spans_columns=cuts_moment,
        home=0,
        shard_basis=stored_once,
        replicated=replicated,
        terms=terms and not pieces,
        copy_of=copy_of,
    )
    settings = _smallest(power_passes, residual)
    assert not terms or formed == is_small(sharding, settings)
    return _counted(sharding, settings)


@lru_cache
def _smallest(power_passes: int, residual: Rule) -> AdaRankGradConfig:
    """Settings with bases of few columns."""
    chosen = {"power_passes": power_passes, "residual": residual, "oversample": 0}
    return parse_config({**chosen, "max_rank": RANK, "min_rank": RANK})


@lru_cache(maxsize=4096)
def _counted(sharding: MatrixSharding, settings: AdaRankGradConfig) -> tuple[int, int]:
    """Number of requests of a step without a refresh, and with one that rotates the moments."""
    state: State = {}

    def requests() -> int:
        return len(requests_of_a_step(state, sharding, settings, RANK))

    requests()
    steady = requests()
    refresh_next(state)
    return steady, requests()
