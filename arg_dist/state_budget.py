"""`state_budget`: limits the optimizer state on all processes together by limiting ranks.

In a step in which any matrix refreshes, one exchange collects the claims of all matrices on every
process; each process then computes the same ranks (:mod:`arg_dist.subspace.budget`). If an engine
calls ``step()`` for part of the matrices at a time, the first call decides for all of them from the
state before the step, so the result does not depend on how the matrices are divided into calls.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from arg_dist.algorithm import claim, is_due, momentum_bytes
from arg_dist.config import AdaRankGradConfig, ConfigError, in_bytes
from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.plan import Plan
from arg_dist.sharding.shard import MatrixShard, Shard, TensorShard
from arg_dist.subspace.budget import Claim, Ranks, allowed_ranks, smallest_bytes
from arg_dist.subspace.compact import row_bytes, tensor_bytes
from arg_dist.subspace.distributed import MatrixSharding, row_count
from arg_dist.subspace.state import OF_EACH_DIRECTION, SCALARS, State
from arg_dist.telemetry import storage_bytes

SCALAR_BYTES = 8 * len(SCALARS)
"""Scalar tensors of a matrix's state, fp64, on each process that holds a part of it."""
PROCESSES = 64
"""Minimum process count used for SCALAR_BYTES, so that ranks do not depend on the real count."""


@dataclass(frozen=True)
class Call:
    """One call to ``step()`` as the engine will make it.

    Attributes:
        settings: settings of its parameter groups.
        plans: plans of its tensors.
    """

    settings: Sequence[AdaRankGradConfig]
    plans: Sequence[Plan]

    def shards(self) -> Iterator[tuple[Shard, AdaRankGradConfig]]:
        """This process's shards, and the settings of each."""
        for plan in self.plans:
            for shard in plan.shards:
                yield shard, self.settings[shard.group]


class StateBudget:
    """Bounds the rank of each matrix at its next refresh.

    Args:
        limit: bytes for all processes together.

    Attributes:
        limit: as passed.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._allowed: Ranks = {}
        self._has_warned = False

    def any_due(self, calls: Sequence[Call], state_of: Callable[[Shard], State]) -> bool:
        """Whether any matrix of which this process holds a part is due for a refresh."""
        return any(
            isinstance(shard, MatrixShard) and is_due(state_of(shard))
            for call in calls
            for shard, _ in call.shards()
        )

    def allowed(self, shard: Shard, state: State, settings: AdaRankGradConfig) -> int | None:
        """Largest rank permitted now; None if the shard is no matrix."""
        if not isinstance(shard, MatrixShard):
            return None
        # bytes already reserved for a matrix are never allotted to another
        reserved = claim_of(shard, state, settings).reserved
        return self._allowed.get(shard.name, reserved)

    def calls_that_share(
        self, plans: Sequence[Plan], calls_of_a_step: Callable[[], list[Call]]
    ) -> list[Call]:
        """All calls of the step if `plans` are its first call's; else empty.

        The first call discards the ranks permitted in the previous step.
        """
        calls = calls_of_a_step()
        if not calls or calls[0].plans is not plans:
            return []
        self._allowed = {}
        return calls

    def share_out(
        self, calls: Sequence[Call], state_of: Callable[[Shard], State], states: Mapping[Any, Any]
    ) -> None:
        """Decide the permitted ranks of all matrices due for a refresh.

        Collective: every process must call it.

        Args:
            calls: all calls of this step.
            state_of: returns a shard's state.
            states: all state of this process, by target and name.

        Raises:
            ConfigError: on every process, if the smallest ranks do not fit, or if the parameters
                belong to different process groups.
        """
        plans = [plan for call in calls for plan in call.plans if plan.names]
        mine = _fixed_bytes(calls, states), list(_claims(calls, state_of))
        communicator = _communicator(plans)
        gathered = communicator.gather_objects(mine, "distributing state_budget", counted=True)
        fixed = sum(own for own, _ in gathered)
        claims = [claim for _, listed in gathered for claim in listed]
        self._check(fixed, claims)
        self._allowed = allowed_ranks(claims, self.limit - fixed)

    def _check(self, fixed: int, claims: Sequence[Claim]) -> None:
        check_fits(self.limit, fixed, claims)
        present = fixed + sum(claim.rank * claim.direction_bytes for claim in claims)
        if present > self.limit and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"state_budget: the present state takes {in_words(present)}, from before this "
                f"budget or before parameters were added, which exceeds {in_words(self.limit)}; "
                "ranks shrink to fit at the next refreshes",
                stacklevel=2,
            )


def check_fits(limit: int, fixed: int, claims: Sequence[Claim]) -> None:
    """Check that the smallest ranks fit into a budget.

    Args:
        limit: bytes for all processes together.
        fixed: bytes of state that do not depend on the ranks.
        claims: the claims of the matrices.

    Raises:
        ConfigError: they do not fit; the message has the smallest sufficient budget.
    """
    smallest = smallest_bytes(claims)
    if fixed + smallest > limit:
        raise ConfigError(
            f"state_budget: got {in_words(limit)}; {in_words(fixed)} are needed whatever the "
            "ranks (mostly full-rank Adam's moments of embeddings, head and norms), and the "
            f"{len(claims)} low-rank matrices need {in_words(smallest)} at their smallest ranks; "
            f"give at least {fixed + smallest} bytes, or lower min_rank"
        )


def claim_of(shard: MatrixShard, state: State, settings: AdaRankGradConfig) -> Claim:
    """The claim of one shard's matrix."""
    return claim(shard.name, shard.sharding, state, settings)


def in_words(size: int) -> str:
    """A human-readable number of bytes: ``12.3 MiB (12897485 bytes)``."""
    return f"{in_bytes(size)} ({size} bytes)" if size >= 1024 else f"{size} bytes"


def _claims(calls: Sequence[Call], state_of: Callable[[Shard], State]) -> Iterator[Claim]:
    """The claims of the matrices whose home is this process: exactly one process per matrix."""
    for call in calls:
        for shard, settings in call.shards():
            if isinstance(shard, MatrixShard) and shard.sharding.home == shard.me:
                yield claim_of(shard, state_of(shard), settings)


def _fixed_bytes(calls: Sequence[Call], states: Mapping[Any, Any]) -> int:
    """Rank-independent bytes that this process holds, or reports as a matrix's home."""
    size, bound = 0, set()
    for call in calls:
        for shard, settings in call.shards():
            bound.add((id(shard.fragment.target), shard.name))
            if isinstance(shard, TensorShard):
                size += moments_bytes(shard, settings)
            elif isinstance(shard, MatrixShard) and shard.sharding.home == shard.me:
                size += fixed_bytes(shard.sharding, settings)
    # include state left by parameters that have since been frozen
    return size + storage_bytes(
        state
        for target, units in states.items()
        for name, state in units.items()
        if (id(target), name) not in bound
    )


def fixed_bytes(sharding: MatrixSharding, settings: AdaRankGradConfig) -> int:
    """Bytes of a matrix's state on all processes that do not depend on its rank."""
    scalars = SCALAR_BYTES * max(PROCESSES, len(sharding.owners))
    rows = sum(row_count(each) for key in OF_EACH_DIRECTION for each in sharding.stored()[key])
    scales = row_bytes(0, settings.state_dtype) * rows
    return scalars + scales + momentum_bytes(sharding.elements.size, settings)


def moments_bytes(shard: TensorShard, settings: AdaRankGradConfig) -> int:
    """Bytes of both moments of a tensor on this process."""
    elements = row_count(shard.sharding.kept_rows[shard.me])
    if shard.moment_type == torch.float64:
        return 2 * shard.moment_type.itemsize * elements
    return 2 * tensor_bytes(elements, settings.full_rank_state)


def _communicator(plans: Sequence[Plan]) -> Communicator:
    """The communicator that all plans share.

    Raises:
        ConfigError: the plans belong to different process groups.
    """
    groups = {plan.communicator.processes for plan in plans}
    if len(groups) > 1:
        raise ConfigError(
            "state_budget: the parameters are spread over different groups of processes "
            f"({', '.join(map(str, sorted(groups)))}), which cannot share one budget; use one "
            "optimizer per group of processes, or leave state_budget out"
        )
    return plans[0].communicator
