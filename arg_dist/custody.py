"""Ownership of the optimizer's state when it is saved and loaded: which process each part is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from arg_dist.algorithm import State
from arg_dist.saved_forms import ELSEWHERE, WHOLE, Place, cut_state, is_packed, pack, unpack
from arg_dist.sharding.plan import Plan
from arg_dist.sharding.shard import Shard
from arg_dist.state import fits


@dataclass(frozen=True)
class Loaded:
    """Contents of a state dictionary for this process.

    Attributes:
        calls: steps taken before it was saved.
        states: states of the matrices and tensors in each target, by name.
    """

    calls: int
    states: dict[Tensor, dict[str, State]]


class Custody:
    """Tracks which process the optimizer's state belongs to while saving and loading.

    Attributes:
        whole: consolidated state for saving, by target and name, and its place; valid until the
            next step.
    """

    def __init__(self) -> None:
        self.whole: tuple[Place, dict[Tensor, dict[str, State]]] | None = None
        self._place: Place | None = None
        self._uncut: set[tuple[Tensor, str]] = set()

    # -- out -------------------------------------------------------------------------------------

    def keep_whole(self, plan: Plan, shard: Shard, state: State | None, to: int) -> None:
        """Keep the result of :func:`whole_state` for a shard of `plan`."""
        assert self.whole is not None
        by_target = self.whole[1]
        if state is not None:
            by_target.setdefault(shard.fragment.target, {})[shard.name] = state
        self.whole = (WHOLE if plan.communicator.me == to else ELSEWHERE, by_target)

    def prepare_saving(
        self,
        saved: dict[str, Any],
        calls: int,
        targets: Sequence[Tensor],
        plans: Sequence[Plan],
    ) -> None:
        """Record in `saved` which process it belongs to, in the form the engine's format requires.

        Args:
            saved: the optimizer's state dictionary.
            calls: steps taken so far.
            targets: the tensors of its groups, in the order of their indexes in it.
            plans: the optimizer's plans.

        Raises:
            RuntimeError: the state has not been consolidated.
        """
        saved["process"], saved["calls"] = None, calls
        for plan in plans:
            place = (plan.communicator.me, plan.communicator.size)
            saved["process"] = saved["process"] or place
            if plan.replicated:
                if self.whole is None:
                    raise RuntimeError(_NOT_CONSOLIDATED)
                saved["process"], whole = self.whole
                saved["state"] = {i: whole[t] for i, t in enumerate(targets) if t in whole}
            elif plan.saved_by_key:
                here = {id(fragment.target) for fragment in plan.held}
                packs = {
                    index: pack(saved["state"].get(index, {}), place, calls, target.device)
                    for index, target in enumerate(targets)
                    if id(target) in here
                }
                saved["state"].update(packs)
                for index, own in packs.items() if plan.saved_by_first() else ():
                    for entry in plan.communicator.gather_objects_on_first(own, "state_dict"):
                        saved["state"][index] = saved["state"][index] | entry

    # -- in --------------------------------------------------------------------------------------

    def load(
        self, saved: Mapping[str, Any], targets: Mapping[Any, Tensor], plans: Sequence[Plan]
    ) -> Loaded:
        """Extract the states of a state dictionary, for the target of each index.

        Raises:
            ConfigError: it contains only states of other processes.
        """
        self.whole, self._place, calls = None, saved.get("process"), saved.get("calls", 0)
        places = [(plan.communicator.me, plan.communicator.size) for plan in plans]
        here = places[0] if places else None
        states = {}
        for index, target in targets.items():
            units = saved["state"].get(index)
            if units and is_packed(units):
                self._place, calls, units = unpack(units, here)
            if units is not None:  # engines may add entries for their own tools
                states[target] = {k: v for k, v in units.items() if isinstance(v, dict)}
        self._place = None if self._place is None else (self._place[0], self._place[1])
        whole = states if self._place == WHOLE else {}
        self._uncut = {(target, name) for target, units in whole.items() for name in units}
        return Loaded(calls, states)

    def cut_loaded(self, plan: Plan, states: Mapping[Tensor, dict[str, State]]) -> None:
        """Reduce state that was loaded whole to this process's part, if the state is sharded."""
        if not (self._uncut and plan.replicated):
            return
        for shard in plan.shards:
            target = shard.fragment.target
            if (target, shard.name) in self._uncut:
                self._uncut.remove((target, shard.name))
                units = states[target]
                units[shard.name] = cut_state(shard, units[shard.name])

    def is_own(self, plan: Plan, states: Mapping[Tensor, dict[str, State]]) -> bool:
        """Whether the state, possibly loaded, belongs to this process and matches the shapes."""
        here = (plan.communicator.me, plan.communicator.size)
        was_cut = plan.replicated and self._place == WHOLE
        if self._place not in (None, here) and not was_cut:
            return False
        return all(
            fits(shard, states[shard.fragment.target].get(shard.name, {})) for shard in plan.shards
        )


_NOT_CONSOLIDATED = (
    "state_dict: the optimizer's state is sharded over the processes, and this process holds only "
    "a part; call optimizer.consolidate_state_dict() on every process, then save on process 0 and "
    "load on all"
)
