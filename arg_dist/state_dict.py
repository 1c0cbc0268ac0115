"""State dictionaries: the whole state, as on a single process, and which process owns each part.

State is sharded, and engines save in two ways that would silently lose most of it. Some write the
first process's state: there, the whole state is gathered on that process first, and each process
takes its rows from it when loading. Others merge the state of all processes by key
(:mod:`arg_dist.packing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from arg_dist.algorithm import read
from arg_dist.sharding.plan import Plan
from arg_dist.sharding.shard import Shard
from arg_dist.subspace.compact import POWERS
from arg_dist.subspace.distributed import Exchange, Rows, Steps, select_rows
from arg_dist.subspace.state import SCALES, SUMMED, WITH_ROWS, State

Holder = tuple[int, int]
"""Owner of a state: index of the process in its group, and the group's size."""

WHOLE: Holder = (0, 1)
ELSEWHERE: Holder = (-1, 1)
"""The state was gathered on another process."""


def whole_state(shard: Shard, state: State, *, to: int) -> Steps[State | None]:
    """Gather the state of a shard from all processes on process `to`.

    Args:
        shard: this process's part.
        state: its state; empty before the first gradient.
        to: index of the process that receives the whole state.

    Returns:
        On `to`, the state as a single process would hold it, on the CPU; None on the others.
    """
    if not state:
        return {} if shard.me == to else None
    everyone = ((0, 1),) * shard.sharding.processes
    requests = {
        key: Exchange(part, have, _only(to, have))
        for key, (part, have) in kept_parts(shard, state).items()
    }
    sums = [key for key in SUMMED if key in state]
    requests |= {k: Exchange(state[k].view(1), everyone, _only(to, everyone)) for k in sums}
    answers = yield tuple(requests.values())
    if shard.me != to:
        return None
    whole = {**_without_scales(state), **dict(zip(requests, answers, strict=True))}
    whole |= {key: whole[key].view(()) for key in sums}
    # copies: what was received are views of one message, which torch.save refuses in two types
    return {
        key: value.to("cpu", copy=True) if isinstance(value, Tensor) else value
        for key, value in whole.items()
    }


def cut_state(shard: Shard, whole: State) -> State:
    """This process's part of a state from :func:`whole_state`.

    State of another shape is returned unchanged; :meth:`Shard.fits` detects it.
    """
    sizes = {key: max(end for _, end in rows) for key, rows in shard.sharding.counted().items()}
    held = whole.keys() & set(WITH_ROWS)
    is_like_it = set(shard.required) <= held <= sizes.keys()
    if not is_like_it or any(whole[key].shape[0] != sizes[key] for key in held):
        return whole
    state, stored = widened(whole), shard.sharding.stored()
    for key in held:
        low, high = stored[key][shard.me]
        state[key] = state[key][low:high].clone()
    if shard.me != 0:
        state |= {key: torch.zeros_like(whole[key]) for key in SUMMED if key in whole}
    return state


def widened(state: Mapping[str, Tensor]) -> State:
    """A copy of the dictionary with all numbers in fp32, as checkpoints have them."""
    wide = {key: read(state, key) for key in POWERS.keys() & state.keys()}
    return _without_scales(state) | wide


def _without_scales(state: Mapping[str, Any]) -> State:
    return {key: value for key, value in state.items() if key not in SCALES.values()}


def kept_parts(shard: Shard, state: State) -> dict[str, tuple[Tensor, Rows]]:
    """The rows that this process contributes to each tensor of a state, and those of all."""
    stored, me, wide = shard.sharding.stored(), shard.me, widened(state)
    return {
        key: (select_rows(wide[key], stored[key][me], rows[me]), rows)
        for key, rows in shard.sharding.counted().items()
        if key in wide
    }


def _only(to: int, have: Rows) -> Rows:
    size = max(stop for _, stop in have)
    return tuple((0, size if i == to else 0) for i in range(len(have)))


class Ownership:
    """Tracks which process the optimizer's state belongs to while saving and loading.

    Attributes:
        whole: consolidated state for saving, by target and name, and its holder; valid until the
            next step.
        uncut: target and name of state that was loaded whole, and may have to be cut.
        known_own: plans whose state was found to be this process's, since it was loaded.
    """

    def __init__(self) -> None:
        self.whole: tuple[Holder, dict[Tensor, dict[str, State]]] | None = None
        self._holder: Holder | None = None
        self.uncut: set[tuple[Tensor, str]] = set()
        self.known_own: WeakSet[Plan] = WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled; plans are of the process that has made them."""
        return {key: value for key, value in vars(self).items() if key != "known_own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill an unpickled one."""
        vars(self).update(state, known_own=WeakSet())

    def carried(
        self, states: Mapping[Tensor, Mapping[str, State]], plans: Sequence[Plan]
    ) -> Ownership:
        """The ownership of a copy of the optimizer: its state is of the process that copies it.

        Args:
            states: the optimizer's state.
            plans: the optimizer's plans; empty before its first step.
        """
        twin = Ownership()
        twin.whole, twin._holder, twin.uncut = self.whole, self._holder, set(self.uncut)
        holders = {(plan.communicator.me, plan.communicator.size) for plan in plans}
        here = holders.pop() if len(holders) == 1 else None
        if here == WHOLE and self._holder in (None, WHOLE):
            # several processes may each take their part of it
            twin._holder = WHOLE
            twin.uncut = {(target, name) for target, units in states.items() for name in units}
        elif here is not None and not self.uncut and self._holder in (None, WHOLE, here):
            twin._holder = here
        return twin

    # -- out -------------------------------------------------------------------------------------

    def keep_whole(self, plan: Plan, shard: Shard, state: State | None, to: int) -> None:
        """Keep the result of :func:`whole_state` for a shard of `plan`."""
        assert self.whole is not None
        by_target = self.whole[1]
        if state is not None:
            by_target.setdefault(shard.fragment.target, {})[shard.name] = state
        self.whole = (WHOLE if plan.communicator.me == to else ELSEWHERE, by_target)

    def sign(self, saved: dict[str, Any], targets: Sequence[Tensor], plans: Sequence[Plan]) -> None:
        """Record in `saved` which process it belongs to; replace sharded state by the whole.

        Args:
            saved: the optimizer's state dictionary.
            calls: steps taken so far.
            targets: the tensors of its groups, in the order of their indexes in it.
            plans: the optimizer's plans; empty if it has not stepped since it was loaded.

        Raises:
            RuntimeError: the state has not been consolidated, or is another process's.
        """
        saved["process"] = None if plans else self._holder
        for plan in plans:
            saved["process"] = saved["process"] or (plan.communicator.me, plan.communicator.size)
            if plan.replicated:
                if self.whole is None:
                    raise RuntimeError(_NOT_CONSOLIDATED)
                saved["process"], whole = self.whole
                saved["state"] = {i: whole[t] for i, t in enumerate(targets) if t in whole}
            elif not self._is_of(plan):
                where = OTHERS_STATE.format(plan.communicator.me, plan.communicator.size)
                raise RuntimeError(f"state_dict: {where}")

    # -- in --------------------------------------------------------------------------------------

    def take(self, states: Mapping[Tensor, Mapping[str, State]], holder: Holder | None) -> None:
        """Begin to track state that was loaded; of `holder`, None: of this process."""
        self.whole, self._holder, self.known_own = None, holder, WeakSet()
        whole = states if holder == WHOLE else {}
        self.uncut = {(target, name) for target, units in whole.items() for name in units}

    def cut_rest(self, plans: Sequence[Plan], states: Mapping[Tensor, dict[str, State]]) -> None:
        """Reduce what is left, the state of frozen parameters, to this process's part."""
        for plan in plans:
            self.cut_loaded(plan, states)
        self.uncut.clear()

    def cut_loaded(self, plan: Plan, states: Mapping[Tensor, dict[str, State]]) -> None:
        """Reduce state that was loaded whole to this process's part, if the state is sharded."""
        if not (self.uncut and plan.replicated):
            return
        for shard in plan.shards:
            target = shard.fragment.target
            if (target, shard.name) in self.uncut:
                self.uncut.remove((target, shard.name))
                units = states[target]
                units[shard.name] = cut_state(shard, units[shard.name])

    def is_own_now(self, plan: Plan, states: Mapping[Tensor, dict[str, State]]) -> bool:
        """:meth:`is_own`, noted in :attr:`known_own`."""
        if found := self.is_own(plan, states):
            self.known_own.add(plan)
        return found

    def is_own(self, plan: Plan, states: Mapping[Tensor, dict[str, State]]) -> bool:
        """Whether the state, possibly loaded, belongs to this process and matches the shapes."""
        return self._is_of(plan) and all(
            shard.fits(states[shard.fragment.target].get(shard.name, {})) for shard in plan.shards
        )

    def _is_of(self, plan: Plan) -> bool:
        here = (plan.communicator.me, plan.communicator.size)
        was_cut = plan.replicated and self._holder == WHOLE
        return self._holder in (None, here) or was_cut


OTHERS_STATE = (
    "the optimizer's state was loaded on process {} of {}, but is of another process, another "
    "number of processes or another model; the state is sharded: each process must load its own"
)

_NOT_CONSOLIDATED = (
    "state_dict: the optimizer's state is sharded over the processes, and this process holds only "
    "a part; call optimizer.consolidate_state_dict() on every process, then save on process 0 and "
    "load on all"
)
