"""The optimizer's statistics: its state, and its communication."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from arg_dist.places import Layout
from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.entry import entry_point
from arg_dist.sharding.plan import Plan
from arg_dist.sharding.shard import MatrixShard, Shard
from arg_dist.state import storage_bytes
from arg_dist.subspace.state import State, progress


class SelfReport:
    """The part of :class:`arg_dist.AdaRankGrad` that reports statistics to the user."""

    state: Any
    _plans: dict[tuple[Layout, ...], list[Plan]]
    _communicators: dict[Any, Communicator]

    def every_plan(self) -> Iterator[Plan]:
        """All plans created so far."""
        return chain.from_iterable(self._plans.values())

    def state_of(self, shard: Shard) -> State:
        """This process's part of a matrix's or tensor's state; empty before its first step."""
        state: State = self.state[shard.fragment.target].setdefault(shard.name, {})
        return state

    @entry_point
    def stats(self) -> list[dict[str, Any]]:
        """One entry for each matrix of which this process holds state.

        Keys: name, shape, side, rank, energy (share of the gradient kept at the last refresh),
        steps_since_refresh, refreshes, state_bytes (on this process).
        """
        # a matrix is in several plans if groups were added or parameters frozen during training
        shards = {shard.name: shard for plan in self.every_plan() for shard in plan.shards}
        return [
            {
                "name": shard.name,
                "shape": shard.shape,
                "side": shard.side_name,
                **progress(state),
                "state_bytes": storage_bytes([state]),
            }
            for shard in shards.values()
            if isinstance(shard, MatrixShard) and (state := self.state_of(shard))
        ]

    @entry_point
    def state_bytes(self) -> int:
        """Bytes of optimizer state on this process, counted as whole storages, not views."""
        return storage_bytes(list(self.state.values()))

    @entry_point
    def comm_bytes(self) -> int:
        """Bytes sent by this process in the optimizer's collectives since it was built."""
        return sum(communicator.sent_bytes for communicator in self._communicators.values())

    @entry_point
    def collectives(self) -> int:
        """Collectives of the optimizer on this process since it was built."""
        return sum(communicator.collectives for communicator in self._communicators.values())

    @entry_point
    def held_elements(self) -> int:
        """Numbers (a complex element has two) that the engine assigns to this optimizer."""
        parts = [part for plan in self.every_plan() for part in plan.held]
        held = {part.name: (part.stop - part.start) * part.width for part in parts}
        return sum(held.values())
