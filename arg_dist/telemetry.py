"""What the optimizer holds and sends, asked of all processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from statistics import fmean
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from arg_dist.sharding.local import local_part

ADAMW_BYTES_PER_ELEMENT = 8
"""AdamW's two fp32 moments."""


@runtime_checkable
class ReportsItself(Protocol):
    """An optimizer that knows its own numbers, as :class:`arg_dist.AdaRankGrad` does."""

    def stats(self) -> list[dict[str, Any]]:
        """Per matrix that this process holds a part of: name, rank, energy and more."""

    def state_bytes(self) -> int:
        """Bytes of optimizer state on this process."""

    def comm_bytes(self) -> int:
        """Bytes this process's optimizer has sent so far."""

    def collectives(self) -> int:
        """Collectives in which this process's optimizer has taken part so far."""

    def held_elements(self) -> int:
        """Parameter elements this process's optimizer is in charge of."""


class Numbers(NamedTuple):
    """What one process says of its optimizer: as :class:`ReportsItself` does, and AdamW's bytes."""

    stats: list[dict[str, Any]]
    state_bytes: int
    adamw_bytes: int
    sent_bytes: int = 0
    collectives: int = 0


@dataclass(frozen=True)
class OptimizerSample:
    """The optimizer over all processes at one moment; the lists go by process index.

    `low_rank_bytes` is the state of the low-rank matrices on all processes together, and
    `low_rank_adamw_bytes` what AdamW keeps for them. `collectives` are those of the
    process that has taken part in most.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    energy: dict[str, float] = field(default_factory=dict)
    state_bytes: list[int] = field(default_factory=list)
    adamw_bytes: list[int] = field(default_factory=list)
    sent_bytes: list[int] = field(default_factory=list)
    collectives: int = 0
    low_rank_bytes: int = 0
    low_rank_adamw_bytes: int = 0

    @property
    def mean_rank(self) -> float | None:
        """The mean over the low-rank matrices, if there are any."""
        return fmean(self.ranks.values()) if self.ranks else None

    @property
    def largest_share(self) -> float | None:
        """State as a share of AdamW's on the process where that share is largest."""
        pairs = zip(self.state_bytes, self.adamw_bytes, strict=True)
        return max((own / adamw for own, adamw in pairs if adamw), default=None)


def sample_optimizer(optimizer: Optimizer) -> OptimizerSample:
    """Asks `optimizer` on all processes; each of them must call this at the same step."""
    own = _own_numbers(optimizer)
    gathered: list[Any] = [own]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
    return merge(gathered)


def _own_numbers(optimizer: Optimizer) -> Numbers:
    if isinstance(optimizer, ReportsItself):
        return Numbers(
            optimizer.stats(),
            optimizer.state_bytes(),
            ADAMW_BYTES_PER_ELEMENT * optimizer.held_elements(),
            optimizer.comm_bytes(),
            optimizer.collectives(),
        )
    state_bytes = sum(
        local_part(value).untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim() > 0  # not the step counters
    )
    return Numbers([], state_bytes, state_bytes)


def merge(gathered: Sequence[Numbers]) -> OptimizerSample:
    """One sample out of what the processes said.

    A matrix that is cut between processes is told by each of them; its rank and energy are theirs
    in common, so the first one's word is enough.
    """
    matrices: dict[str, dict[str, Any]] = {}
    for said in gathered:
        for matrix in said.stats:
            matrices.setdefault(matrix["name"], matrix)
    # A matrix without a basis yet (before the first refresh) has no rank to tell.
    known = {name: matrix for name, matrix in sorted(matrices.items()) if matrix["rank"]}
    return OptimizerSample(
        ranks={name: matrix["rank"] for name, matrix in known.items()},
        energy={name: matrix["energy"] for name, matrix in known.items()},
        state_bytes=[said.state_bytes for said in gathered],
        adamw_bytes=[said.adamw_bytes for said in gathered],
        sent_bytes=[said.sent_bytes for said in gathered],
        collectives=max(said.collectives for said in gathered),
        low_rank_bytes=sum(part["state_bytes"] for said in gathered for part in said.stats),
        low_rank_adamw_bytes=ADAMW_BYTES_PER_ELEMENT
        * sum(prod(matrix["shape"]) for matrix in matrices.values()),
    )
