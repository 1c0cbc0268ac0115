"""Binding: from the optimizer's parameter groups to plans, whatever an engine or a user replaces.

Engines put other tensors into the groups, and users move, reshape and freeze them, while the
optimizer trains. Parameters are known by their slots; plans are made for the tensors that the
groups hold now, and again when these change.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from arg_dist.config import ConfigError
from arg_dist.coverage import Coverage, needs_no_guess
from arg_dist.parameter_groups import group_spec, settings_of
from arg_dist.sharding.communicator import Communicator, training_group
from arg_dist.sharding.fragment import ParameterGroup, hold, step_calls
from arg_dist.sharding.job import is_first_process
from arg_dist.sharding.plan import Plan, make_plans
from arg_dist.sharding.shard import Shard
from arg_dist.state_budget import Call
from arg_dist.subspace.state import State
from arg_dist.uses import Use, full_shape, uses_without_model

Groups = list[dict[str, Any]]

RESTING = (0, False)
"""First in the key of the plans of frozen parameters."""

CALLS_WITHOUT_GRADIENT = 3
"""Calls to ``step()`` in a row without any gradient after which the user is warned."""


class Slot(NamedTuple):
    """Where a parameter is: the list that its group had when it was added, and the index in it.

    This holds no parameter by itself. If an engine shards a parameter and puts another tensor into
    the list, the whole parameter is freed; if it gives the group a list of its own tensors, this
    list still has the model's. A weak reference to a tensor would make
    ``torch.utils.swap_tensors`` refuse it, with which modules move such parameters.

    Attributes:
        params: the list.
        position: index in it.
    """

    params: list[Tensor]
    position: int

    @property
    def parameter(self) -> Tensor | None:
        """What is there now; None if the list has become shorter."""
        return self.params[self.position] if self.position < len(self.params) else None


Layout = tuple[Any, ...]
"""What a plan depends on in one tensor: ``id``, `requires_grad`, shape, strides, distribution."""


def layout_of(tensor: Tensor) -> Layout:
    """The layout of a tensor now.

    A tensor remains the same object when its contents are replaced (``tensor.data = ...``,
    ``swap_tensors``), so its ``id`` alone does not tell. Device and dtype are looked up at every
    step, and no plan depends on them.
    """
    return (
        id(tensor),
        tensor.requires_grad,
        None if is_lazy(tensor) else tuple(tensor.shape),
        tensor.stride() if tensor.layout == torch.strided and not is_lazy(tensor) else None,
        getattr(tensor, "placements", None),
        getattr(tensor, "device_mesh", None),
    )


def has_changed(before: Layout, now: Layout) -> bool:
    """Whether a tensor has another shape, strides or distribution; it may train or be frozen."""
    return before[2:] != now[2:]


States = Mapping[Tensor, dict[str, State]]
"""The optimizer's state by target and name."""


def state_of(shard: Shard, states: States) -> State:
    """This process's part of a matrix's or tensor's state; empty before its first step."""
    return states[shard.fragment.target].setdefault(shard.name, {})


class Binding:
    """The optimizer's parameters by name, and the plans made for the tensors that it holds.

    Args:
        process_group: as of the optimizer.
        patterns_applied: no `targets` or `exclude` wait for the names of the model's modules.
        all_chosen: someone chose for all parameters whether they are trained in low rank.

    Attributes:
        process_group: as of the optimizer.
        communicators: by process group.
        is_classified: whether someone chose which parameters are trained in low rank.
        coverage: what is trained in low rank.
        every_group: all parameter groups: an engine may call :meth:`AdaRankGrad.step` with one at
            a time, and remove the others from `param_groups` meanwhile.
    """

    def __init__(
        self, process_group: Any, *, patterns_applied: bool, all_chosen: bool = False
    ) -> None:
        self.process_group = process_group
        self.communicators: dict[Any, Communicator] = {}
        self.is_classified = False
        self.coverage = Coverage()
        self.every_group: Groups = []
        self._patterns_applied = patterns_applied
        self._all_chosen = all_chosen
        self._slots: dict[str, Slot] = {}
        self._full_rank: frozenset[str] = frozenset()
        self._plans: dict[tuple[Layout, ...], list[Plan]] = {}
        self._tensors_of_plans: dict[tuple[Layout, ...], list[Tensor]] = {}

    def twin(self) -> Binding:
        """The binding of a copy of the optimizer: it makes its own plans and communicators."""
        twin = Binding(
            self.process_group,
            patterns_applied=self._patterns_applied,
            all_chosen=self._all_chosen,
        )
        twin.is_classified, twin.coverage = self.is_classified, self.coverage
        twin._slots, twin._full_rank = self._slots, self._full_rank
        return twin

    # -- parameters and their names --------------------------------------------------------------

    def add(self, group: Mapping[str, Any], *, is_classified: bool) -> None:
        """Add the parameters of a new group, or those that take the place of others.

        Args:
            group: the group; if all its names are known, its tensors take their place.
            is_classified: whether someone chose if they are trained in low rank; else embeddings
                and output heads, as far as names or shapes tell them, are kept full-rank.
        """
        names, params = group["param_names"], group["params"]
        if names and self._slots.keys() >= set(names):
            self._slots |= {name: Slot(params, index) for index, name in enumerate(names)}
            return
        self.is_classified |= is_classified
        uses: dict[str, Use] = {}
        if not (is_classified or self._all_chosen or any(map(needs_no_guess, params))):
            uses = uses_without_model(names, [full_shape(each) for each in params])
        self._full_rank |= uses.keys()
        for index, name in enumerate(names):
            self._slots[name] = Slot(params, index)
            self.coverage.add(name, params[index], uses.get(name))

    def taken_names(self, groups: Groups) -> set[str]:
        """Names in all groups but the last one, and in those that an engine has put aside."""
        return {
            name
            for group in (*self.every_group, *groups)
            if group is not groups[-1]
            for name in group["param_names"]
        }

    @property
    def parameters(self) -> dict[str, Tensor | None]:
        """The parameters by name; None for those whose slot no longer exists."""
        return {name: slot.parameter for name, slot in self._slots.items()}

    @property
    def count(self) -> int:
        """Number of parameters."""
        return len(self._slots)

    def rename(
        self, names: Mapping[str, str], full_rank: Iterable[str], uses: Mapping[str, Use]
    ) -> None:
        """Rename parameters, keep some full-rank; see :meth:`AdaRankGrad.adopt_names`."""
        self._slots = {names.get(old, old): slot for old, slot in self._slots.items()}
        self.coverage.rename(names, uses)
        self._full_rank = frozenset(full_rank)
        self._patterns_applied = True

    def shapes(self, groups: Groups) -> dict[str, list[int]]:
        """Full shapes of the parameters, by name, as far as they are known."""
        shapes: dict[str, list[int]] = {}
        for group in map(self._seen, groups):
            known = group.alive()
            if not known and len(group.targets) == len(group.names):
                known = list(zip(group.names, group.targets, strict=True))
            shapes |= {name: list(full_shape(parameter)) for name, parameter in known}
        return shapes

    def holders(self, groups: Groups) -> dict[Tensor, tuple[int, int]]:
        """Of each tensor, this process's index among those that divide its state, and their number.

        Args:
            groups: the optimizer's parameter groups now.
        """
        found: dict[Tensor, tuple[int, int]] = {}
        for group in groups:
            seen = self._seen(group, resting=True)
            communicator = Communicator(hold(seen).group)
            found |= dict.fromkeys(seen.targets, (communicator.me, communicator.size))
        return found

    def follow(self, groups: Groups) -> None:
        """Note the groups that the optimizer has now, unless these are some of them only."""
        if len(groups) >= len(self.every_group):
            self.every_group = groups

    # -- plans -----------------------------------------------------------------------------------

    def every_plan(self) -> Iterator[Plan]:
        """All plans made so far."""
        return chain.from_iterable(self._plans.values())

    def forget_plans(self) -> None:
        """Discard existing plans, because settings have changed."""
        self._plans.clear()
        self._tensors_of_plans.clear()

    def plans_of_state(
        self, groups: Groups, states: States, frozen: Collection[str] = ()
    ) -> list[Plan]:
        """Plans of all that is saved; see :meth:`AdaRankGrad.bind_all`."""
        calls = self.calls_of_a_step(groups, states)
        trained = [plan for call in calls for plan in call.plans]
        return trained + self.resting_plans(states, frozen)

    def calls_of_a_step(self, groups: Groups, states: States) -> list[Call]:
        """The calls to ``step()`` that the engine will make, without those that have no tensors.

        Args:
            groups: the optimizer's parameter groups now.
            states: the optimizer's state.
        """
        self.follow(groups)
        every = self.every_group
        calls = []
        for call in step_calls([self._seen(group) for group in every]):
            held = [{**every[i], "params": targets} for i, targets in call if targets]
            if held:
                settings = [settings_of(group) for group in held]
                calls.append(Call(settings, self.plans(held, states)))
        return calls

    def resting_plans(self, states: States, frozen: Collection[str] = ()) -> list[Plan]:
        """Plans of frozen parameters that have state, or whose names are given.

        Local where every process holds the parameters whole; otherwise collective.
        """
        groups = []
        for group in self.every_group:
            if len(group["params"]) != len(group["param_names"]):
                continue  # an engine's own tensors, which are never frozen
            rest = [
                (name, target)
                for name, target in zip(group["param_names"], group["params"], strict=True)
                if not target.requires_grad and (name in frozen or states.get(target))
            ]
            if rest:
                names, targets = map(list, zip(*rest, strict=True))
                groups.append({**group, "params": targets, "param_names": names})
        return self.plans(groups, states, resting=True) if groups else []

    def plans(self, groups: Groups, states: States, *, resting: bool = False) -> list[Plan]:
        """Plans for the tensors that the groups of one call hold now, made on first use.

        Args:
            groups: the parameter groups.
            states: the optimizer's state.
            resting: the parameters are frozen, and held as if they trained.

        Raises:
            RuntimeError: on every process: the state of a tensor does not fit its present shape.
        """
        tensors = [tensor for group in groups for tensor in group["params"]]
        layouts = tuple(map(layout_of, tensors))
        key = (RESTING, *layouts) if resting else layouts
        if key not in self._plans:
            outdated = self._outdated(layouts)
            plans = self._make_plans(groups, resting=resting)
            if outdated:
                before = [plan for old in outdated for plan in self._plans[old]]
                _refuse_misfits(before, plans, states)
            for old in outdated:
                del self._plans[old], self._tensors_of_plans[old]
            self._plans[key] = plans
            self._tensors_of_plans[key] = tensors  # alive, so that their ids stay theirs
        return self._plans[key]

    def _outdated(self, layouts: tuple[Layout, ...]) -> list[tuple[Layout, ...]]:
        """The plans of tensors that have changed, or that the groups no longer hold."""
        calls = step_calls([self._seen(group) for group in self.every_group])
        now = {layout[0]: layout for layout in layouts}
        held = {id(tensor) for call in calls for _, targets in call for tensor in targets}
        held |= now.keys()
        return [
            old
            for old in self._plans
            if any(
                layout[0] not in held or has_changed(layout, now.get(layout[0], layout))
                for layout in old
                if layout != RESTING
            )
        ]

    def _make_plans(self, groups: list[dict[str, Any]], *, resting: bool) -> list[Plan]:
        if not self._patterns_applied:
            raise ConfigError(
                "targets, exclude: the optimizer was built from bare parameters, which have no "
                "module names; build its groups with arg_dist.param_groups(model, targets=..., ...)"
            )
        if not groups:
            return []
        specs = [
            group_spec(
                self._seen(group, resting=resting),
                settings_of(group),
                self._full_rank,
                {name: self._slots[name].position for name in group["param_names"]},
            )
            for group in groups
        ]
        self.coverage.tell(
            self.every_group,
            self._full_rank,
            is_classified=self.is_classified or self._all_chosen,
            aloud=is_first_process(training_group(self.process_group)),
        )
        timeout, bucket_size = groups[0]["collective_timeout"], groups[0]["bucket_size"]
        return make_plans(specs, self.communicators, timeout, bucket_size, resting=resting)

    def _seen(self, group: dict[str, Any], *, resting: bool = False) -> ParameterGroup:
        """A group in the form that the engine adapters take.

        Raises:
            RuntimeError: parameters were added to the group's list, or removed from it.
        """
        names = group["param_names"]
        slots = [self._slots[name] for name in names]
        if slots and slots[0].params is group["params"] and len(slots) != len(group["params"]):
            raise RuntimeError(
                f"parameter group of {names[0]}: it was built with {len(names)} parameters, and "
                f"its list has {len(group['params'])} now; to freeze a parameter use "
                "requires_grad_(False), to add one add_param_group, or build a new optimizer"
            )
        process_group = training_group(self.process_group)
        parameters = [slot.parameter for slot in slots]
        together = [target for each in self.every_group for target in each["params"]]
        return ParameterGroup(
            list(group["params"]), names, parameters, process_group, resting, together
        )


def _refuse_misfits(outdated: Iterable[Plan], plans: Iterable[Plan], states: States) -> None:
    """Check, on all processes, that state fits the tensors as they are now."""
    before = {part.name: part.parameter_shape for plan in outdated for part in plan.held}
    for plan in plans:
        mine = [
            shard.fragment
            for shard in plan.shards
            if (state := state_of(shard, states))
            and (
                before.get(shard.fragment.name) not in (None, shard.fragment.parameter_shape)
                or not shard.fits(state)
            )
        ]
        found = [(each.name, each.parameter_shape) for each in mine]
        everyone = plan.communicator.gather_objects(found, "comparing changed parameters")
        for name, shape in (misfit for found in everyone for misfit in found):
            raise RuntimeError(
                f"{name}: after its last step it was given another shape or distribution over "
                f"the processes (shape {before.get(name, shape)}, now {shape}), and its "
                "optimizer state does not fit; build a new optimizer from the model's "
                "parameters, or delete its state (del optimizer.state[parameter], on every "
                "process) to start it anew"
            )


class GradientsMissing:
    """Warns, once, when no parameter of the optimizer ever has a gradient.

    Attributes:
        calls: calls to ``step()`` in a row without one; set to 0 by the first that has one.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._has_warned = False

    def note(self, groups: Groups, names: int) -> None:
        """Note one call to ``step()`` in which every gradient was zero.

        Args:
            groups: the parameter groups of this call.
            names: number of the optimizer's parameters, for the message.
        """
        if self._has_warned:
            return
        tensors = [tensor for group in groups for tensor in group["params"]]
        self.calls = 0 if any(each.grad is not None for each in tensors) else self.calls + 1
        if self.calls == CALLS_WITHOUT_GRADIENT:
            self._has_warned = True
            warnings.warn(
                f"step: none of the optimizer's {names} parameters has had a gradient in "
                f"{self.calls} calls, so nothing is trained. Either backward() has not run, or "
                "the model has other parameters now (load_state_dict(assign=True), to_empty() and "
                "other conversions replace them): build the optimizer from the model's present "
                "parameters",
                stacklevel=5,
            )
