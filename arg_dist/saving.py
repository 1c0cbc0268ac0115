"""The part of the optimizer that saves and loads its state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from arg_dist.binding import Binding, state_of
from arg_dist.library_internals import LOAD_POST_HOOKS, LOAD_PRE_HOOKS
from arg_dist.loading import check_shapes, groups_to_load, states_to_load
from arg_dist.packing import expected_bytes, pack
from arg_dist.parameter_groups import members, settings_of, without_arrays
from arg_dist.sharding.drivers import run
from arg_dist.sharding.entry import entry_point
from arg_dist.sharding.plan import Plan
from arg_dist.sharding.shares import is_merged, is_sharded
from arg_dist.state import copy_state
from arg_dist.state_dict import OTHERS_STATE, WHOLE, Ownership, whole_state
from arg_dist.subspace.state import State

_OF_COPIES = (
    "state_dict: the optimizer's state is sharded over the copies of a model, sharded itself "
    '(gradient_sync="sketch"), which PyTorch\'s checkpoints cannot express; save with '
    "arg_dist.checkpoint, from which any engine and number of processes can resume"
)


class Saving(torch.optim.Optimizer):
    """The part of :class:`arg_dist.AdaRankGrad` that saves and loads its state.

    Attributes:
        expects_bytes: set to True to load, into an optimizer that has no state, what
            ``torch.distributed.checkpoint`` wrote with a version of arg_dist before 0.2.
    """

    calls: int
    skipped_steps: int
    _binding: Binding
    _ownership: Ownership
    expects_bytes = False

    @entry_point
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather sharded state on one process, for a checkpoint that only this process writes.

        For replicated parameters; a no-op under engines that shard them. Collective: every process
        must call it. Until the next step, :meth:`state_dict` on process `to` returns the whole
        state, which any number of processes can load.

        Args:
            to: index in the group of the process that writes; it needs CPU memory for the whole
                state, and device memory for one matrix at a time.

        Raises:
            RuntimeError: on every process, if one of them has loaded another's state.
        """
        plans = self.plans_of_state()
        self._ownership.whole = (WHOLE, {})
        for plan in plans:
            if not plan.replicated:
                continue
            own = plan.communicator.gather_objects(
                self._ownership.is_own(plan, self.state), "consolidate_state_dict"
            )
            if not all(own):
                raise RuntimeError(
                    "consolidate_state_dict: " + OTHERS_STATE.format(own.index(False), len(own))
                )
            for shard in plan.shards:
                part = whole_state(shard, state_of(shard, self.state), to=to)
                purpose = "consolidate_state_dict"
                state = run([part], plan.communicator, 1, purpose, [shard.name])[0]
                self._ownership.keep_whole(plan, shard, state, to)

    def _cut_loaded(self, plans: Sequence[Plan]) -> None:
        """Reduce state that was loaded whole to this process's part, where state is sharded."""
        for plan in plans:
            self._ownership.cut_loaded(plan, self.state)
        if self._ownership.uncut and any(plan.replicated for plan in plans):
            self._ownership.cut_rest(self._binding.resting_plans(self.state), self.state)

    @entry_point
    def plans_of_state(self) -> list[Plan]:
        """Plans of all parameters that train or have state, of which each process has its part.

        Collective: every process must call it, after the engine has taken over the parameters.
        """
        plans = self._binding.plans_of_state(self.param_groups, self.state)
        for plan in plans:
            self._ownership.cut_loaded(plan, self.state)
        return plans

    @entry_point
    def check_own_state(self, plans: Sequence[Plan]) -> None:
        """Check that the state is this process's, before it is saved.

        Raises:
            RuntimeError: it was loaded, and is another's.
        """
        for plan in plans:
            if not self._ownership.is_own(plan, self.state):
                raise RuntimeError(
                    "load_state_dict: "
                    + OTHERS_STATE.format(plan.communicator.me, plan.communicator.size)
                )

    @entry_point
    def state_dict(self) -> dict[str, Any]:
        """Return this process's state, marked with the process it belongs to.

        Under engines that shard the parameters, and for ``torch.distributed.checkpoint``, every
        process must call it.

        Raises:
            RuntimeError: the model is replicated and the state sharded, but
                :meth:`consolidate_state_dict` has not been called since the last step; or it was
                loaded, and is another process's; or it is sharded over several copies of a model.
        """
        targets = members(self.param_groups)
        plans, merged = list(self._binding.every_plan()), is_merged()
        if not merged and any(map(is_sharded, targets)):
            merged = bool(plans or self.state)
        if merged:
            plans = self.plans_of_state()
            if any(plan.copy_of for plan in plans):
                raise RuntimeError(_OF_COPIES)
            self.check_own_state(plans)

        def sign(_: Any, saved: dict[str, Any]) -> None:
            self._sign(saved, plans, targets, merged=merged)

        # before the hooks of others, which see what is saved
        with self.register_state_dict_post_hook(sign, prepend=True):
            return super().state_dict()

    def _sign(
        self,
        saved: dict[str, Any],
        plans: Sequence[Plan],
        targets: Sequence[Tensor],
        *,
        merged: bool,
    ) -> None:
        """Complete torch's state dictionary: whose state it is, in the form that is needed."""
        saved["param_groups"] = [without_arrays(group) for group in saved["param_groups"]]
        saved["calls"] = self.calls
        if merged:
            saved["process"] = None
            saved["state"] = self._packed(plans, targets)
        else:
            self._ownership.sign(saved, targets, plans)
        entries = [entry.values() for entry in saved["state"].values()]
        saved["units"] = sum(isinstance(unit, Mapping) for entry in entries for unit in entry)
        saved["shapes"] = self._binding.shapes(self.param_groups)

    def _packed(self, plans: Sequence[Plan], targets: Sequence[Tensor]) -> dict[int, Any]:
        """The state in the form of checkpoints that merge all processes by key."""
        index = {id(target): i for i, target in enumerate(targets)}
        settings = {
            id(target): settings_of(group)
            for group in self.param_groups
            for target in group["params"]
        }
        units = [(plan.communicator, unit) for plan in plans for unit in plan.units]
        packed: dict[int, Any] = {}
        for communicator, unit in units:
            target = unit.fragment.target
            entry = packed.setdefault(index[id(target)], {})
            # torch looks for the keys of the state where it restores flattened names
            state = self.state[target].setdefault(unit.name, {})
            if self.expects_bytes and not any(map(len, self.state[target].values())):
                holder = (communicator.me, communicator.size)
                entry.update(expected_bytes(holder, target.device))
            else:
                chosen = settings[id(target)]
                entry[unit.name] = pack(
                    unit, state, communicator, chosen, calls=self.calls, units=len(units)
                )
        return packed

    @entry_point
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a :meth:`state_dict`; unlike in torch, every tensor keeps its dtype.

        State is sharded: if a process loads another process's state, the next step raises a
        RuntimeError.

        Raises:
            ConfigError: it is the state of another optimizer or of another model, or a part of it
                is missing; nothing has been changed.
        """
        state_dict = self._as_hooks_leave(state_dict)
        groups = groups_to_load(self.param_groups, state_dict)
        check_shapes(state_dict, self._binding.shapes(self.param_groups))
        targets = members(self.param_groups)
        holders = cache(partial(self._binding.holders, self.param_groups))
        loaded = states_to_load(state_dict, targets, lambda t: holders()[t], merged=is_merged())
        # nothing has been changed so far
        self.param_groups = self._binding.every_group = groups
        self.state = defaultdict(dict)
        for target, units in loaded.states.items():
            self.state[target] = copy_state(units, target.device)
        self._ownership.take(loaded.states, loaded.holder)
        self.calls, self.expects_bytes = loaded.calls or 0, False
        for hook in LOAD_POST_HOOKS.of(self).values():
            hook(self)

    def _as_hooks_leave(self, state_dict: Any) -> Any:
        # hooks may change the dictionary that they are given, but not the caller's
        state_dict = state_dict.copy() if isinstance(state_dict, dict) else state_dict
        for hook in LOAD_PRE_HOOKS.of(self).values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    @entry_point
    def replace_state(
        self, states: Mapping[Tensor, dict[str, State]], calls: int, skipped_steps: int
    ) -> None:
        """Replace this process's state.

        Args:
            states: for each tensor that :meth:`bind_all` found, the states of its matrices and
                tensors by name.
            calls: calls to :meth:`step` so far; equal on all processes.
            skipped_steps: how many of them skipped the step.
        """
        self._ownership = Ownership()
        self.state.clear()
        self.state.update(states)
        self.calls, self.skipped_steps = calls, skipped_steps
