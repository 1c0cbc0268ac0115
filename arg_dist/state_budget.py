"""`state_budget`: what the optimizer keeps on all processes together, and what each matrix may.

One exchange in a step in which any matrix of the optimizer refreshes tells every process what all
matrices ask for; then each of them decides the same (:mod:`arg_dist.subspace.budget`). An engine
may call ``step()`` for a part of the matrices at a time: the first call decides for all of them, by
what was there before the step, so that it makes no difference how they are divided up.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arg_dist.algorithm import State, is_due
from arg_dist.config import AdaRankGradConfig, ConfigError, in_bytes
from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.plan import Plan
from arg_dist.sharding.shard import MatrixShard, Shard, TensorShard
from arg_dist.state import storage_bytes
from arg_dist.subspace.budget import Claim, Ranks, allowed_ranks, smallest_bytes
from arg_dist.subspace.spread import Spread, row_count

SCALAR_BYTES = 16
"""||P||^2 and the residual's norm, fp64, on each process that has a part of a matrix."""
PROCESSES = 64
"""For as many, at least, these are counted, lest ranks depend on how many there are."""


@dataclass(frozen=True)
class Call:
    """One call of ``step()`` as the engine is going to make it.

    Attributes:
        settings: of its parameter groups.
        plans: of its tensors.
    """

    settings: Sequence[AdaRankGradConfig]
    plans: Sequence[Plan]

    def shards(self) -> Iterator[tuple[Shard, AdaRankGradConfig]]:
        """This process's shards, and the settings of each."""
        for plan in self.plans:
            for shard in plan.shards:
                yield shard, self.settings[shard.group]


class StateBudget:
    """The largest rank that each matrix may get at its next refresh.

    Args:
        limit: bytes for all processes together; None for no budget.

    Attributes:
        limit: as given.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._allowed: Ranks = {}
        self._has_warned = False

    def any_due(self, calls: Sequence[Call], state_of: Callable[[Shard], State]) -> bool:
        """Whether any matrix of which this process has a part looks for a new basis."""
        return any(
            isinstance(shard, MatrixShard) and is_due(state_of(shard))
            for call in calls
            for shard, _ in call.shards()
        )

    def allowed(self, shard: Shard, state: State, settings: AdaRankGradConfig) -> int | None:
        """The largest rank that a matrix may get now; None for no budget, or no matrix."""
        if self.limit is None or not isinstance(shard, MatrixShard):
            return None
        # nobody else was given what it has
        reserved = claim_of(shard, state, settings).reserved
        return self._allowed.get(shard.name, reserved)

    def forget(self) -> None:
        """Drops what was allowed: a new step begins."""
        self._allowed = {}

    def share_out(
        self, calls: Sequence[Call], state_of: Callable[[Shard], State], states: Mapping[Any, Any]
    ) -> None:
        """Decides what the matrices that are due may get; every process must call it.

        Args:
            calls: all calls of this step.
            state_of: from a shard to its state.
            states: all state of this process, by target and name.

        Raises:
            ConfigError: on every process, if the smallest ranks do not fit, or if no process has
                to do with all parameters.
        """
        assert self.limit is not None
        plans = [plan for call in calls for plan in call.plans if plan.names]
        mine = _fixed_bytes(calls, states), list(_claims(calls, state_of))
        communicator = _communicator(plans)
        everyone = communicator.gather_objects(mine, "sharing out state_budget", counted=True)
        fixed = sum(own for own, _ in everyone)
        claims = [claim for _, theirs in everyone for claim in theirs]
        self._check(fixed, claims)
        self._allowed = allowed_ranks(claims, self.limit - fixed)

    def _check(self, fixed: int, claims: Sequence[Claim]) -> None:
        assert self.limit is not None
        check_fits(self.limit, fixed, claims)
        present = fixed + sum(claim.rank * claim.direction_bytes for claim in claims)
        if present > self.limit and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"state_budget: {in_words(present)} are kept now, from before this budget or "
                f"before parameters were added, and {in_words(self.limit)} were given; the ranks "
                "come down to it as the bases are renewed",
                stacklevel=2,
            )


def check_fits(limit: int, fixed: int, claims: Sequence[Claim]) -> None:
    """Looks whether the smallest ranks fit into a budget.

    Args:
        limit: bytes for all processes together.
        fixed: bytes that are kept whatever the ranks.
        claims: what the matrices ask for.

    Raises:
        ConfigError: they do not; the message has the smallest budget that works.
    """
    smallest = smallest_bytes(claims)
    if fixed + smallest > limit:
        raise ConfigError(
            f"state_budget: got {in_words(limit)}; {in_words(fixed)} are kept whatever "
            "the ranks (mostly full-rank Adam's moments of embeddings, head and norms), and "
            f"the {len(claims)} low-rank matrices take {in_words(smallest)} at their smallest "
            f"ranks; give at least {fixed + smallest} bytes, or lower min_rank"
        )


def claim_of(shard: MatrixShard, state: State, settings: AdaRankGradConfig) -> Claim:
    """What a matrix asks for."""
    return claim(shard.name, shard.spread, state, settings)


def claim(name: str, spread: Spread, state: State, settings: AdaRankGradConfig) -> Claim:
    """What a matrix asks for that lies as `spread` says."""
    smallest, largest = settings.rank_bounds(min(spread.basis.size, spread.moment.size))
    stored = sum(row_count(rows) for rows in spread.store)
    return Claim(
        name=name,
        smallest=smallest,
        largest=largest,
        rank=state.get("rank", 0),
        direction_bytes=4 * (2 * spread.moment.size + stored),
        elements=spread.moment.size * spread.basis.size,
        energy=settings.energy,
        spectrum=state.get("spectrum"),
        is_due=is_due(state),
    )


def in_words(size: int) -> str:
    """A number of bytes as people read it: ``12.3 MiB (12897485 bytes)``."""
    return f"{in_bytes(size)} ({size} bytes)" if size >= 1024 else f"{size} bytes"


def _claims(calls: Sequence[Call], state_of: Callable[[Shard], State]) -> Iterator[Claim]:
    """Those of the matrices that this process speaks for: each has one process that does."""
    for call in calls:
        for shard, settings in call.shards():
            if isinstance(shard, MatrixShard) and shard.spread.home == shard.me:
                yield claim_of(shard, state_of(shard), settings)


def _fixed_bytes(calls: Sequence[Call], states: Mapping[Any, Any]) -> int:
    """What this process keeps, or speaks for, whatever the ranks."""
    size, bound = 0, set()
    for call in calls:
        for shard, _ in call.shards():
            bound.add((id(shard.fragment.target), shard.name))
            if isinstance(shard, TensorShard):
                size += 8 * row_count(shard.side.keep[shard.me])
            elif isinstance(shard, MatrixShard) and shard.spread.home == shard.me:
                size += SCALAR_BYTES * max(PROCESSES, len(shard.spread.owners))
    # parameters that are frozen now may have left state behind
    return size + storage_bytes(
        state
        for target, units in states.items()
        for name, state in units.items()
        if (id(target), name) not in bound
    )


def _communicator(plans: Sequence[Plan]) -> Communicator:
    """That of the processes which all have to do with all plans.

    Raises:
        ConfigError: there are none such.
    """
    groups = {plan.communicator.processes for plan in plans}
    if len(groups) > 1:
        raise ConfigError(
            "state_budget: the parameters are spread over different groups of processes "
            f"({', '.join(map(str, sorted(groups)))}), which cannot share one budget; give the "
            "parameters of each an optimizer of its own, or leave state_budget out"
        )
    return plans[0].communicator
