"""The part of the optimizer that maps its parameters to a layout."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from arg_dist.config import ConfigError
from arg_dist.coverage import Coverage
from arg_dist.parameter_groups import group_spec, settings_of
from arg_dist.places import GradientsMissing, Layout, Place, has_changed, layout_of
from arg_dist.self_report import SelfReport
from arg_dist.sharding.communicator import training_group
from arg_dist.sharding.entry import entry_point
from arg_dist.sharding.fragment import ParameterGroup, step_calls
from arg_dist.sharding.job import is_first_process
from arg_dist.sharding.plan import Plan, make_plans
from arg_dist.sharding.shard import local_part
from arg_dist.state import move_state
from arg_dist.state_budget import Call
from arg_dist.uses import Use, full_shape

RESTING = (0, False)
"""First in the key of the plans of frozen parameters."""


class Binding(SelfReport):
    """The part of :class:`arg_dist.AdaRankGrad` that binds parameters to a layout.

    An engine may call :meth:`step` with one parameter group at a time and remove the others from
    `param_groups` meanwhile; `_every_group` keeps all of them.
    """

    param_groups: list[dict[str, Any]]
    _every_group: list[dict[str, Any]]
    defaults: dict[str, Any]
    process_group: Any
    _parameters: dict[str, Place]
    _tensors_of_plans: dict[tuple[Layout, ...], list[Tensor]]
    _full_rank_names: frozenset[str]
    _gradients_missing: GradientsMissing
    _patterns_applied: bool
    _coverage: Coverage
    is_classified: bool

    @entry_point
    def parameter_names(self) -> dict[int, str]:
        """Names of the parameters the optimizer was built with, by ``id``."""
        return {id(place.parameter): name for name, place in self._parameters.items()}

    @entry_point
    def adopt_names(
        self,
        names: Mapping[str, str],
        full_rank: Iterable[str],
        uses: Mapping[str, Use] | None = None,
    ) -> None:
        """Rename parameters and keep some of them full-rank; only before the first step.

        For engines that build the optimizer from bare parameters and have the model.

        Args:
            names: new name for each old one.
            full_rank: new names of the parameters trained by full-rank Adam.
            uses: uses of the model's parameters, by new name.
        """
        if self._plans or any(self.state.values()):  # state is kept by name
            raise RuntimeError(
                "parameters can be renamed only before the first step; pass a new optimizer "
                "without state to the engine, then load the state"
            )
        self._parameters = {names.get(old, old): place for old, place in self._parameters.items()}
        for group in self.param_groups:
            group["param_names"] = [names.get(old, old) for old in group["param_names"]]
        self._coverage.rename(names, uses or {})
        self._full_rank_names = frozenset(full_rank)
        self._patterns_applied = True

    @entry_point
    def bind(self, *, anew: bool = False) -> list[Plan]:
        """Plans for all tensors, as the engine will pass them to :meth:`step`.

        Collective: every process must call it, after the engine has taken over the parameters.

        Args:
            anew: discard existing plans, because settings have changed.
        """
        if anew:
            self._plans.clear()
            self._tensors_of_plans.clear()
        return [plan for call in self.calls_of_a_step() for plan in call.plans]

    @entry_point
    def bind_all(self, *, frozen: Collection[str] = (), anew: bool = False) -> list[Plan]:
        """Plans of all that is saved: tensors that train, and frozen parameters that have state.

        Collective: every process must call it, after the engine has taken over the parameters.

        Args:
            frozen: names of frozen parameters to include whether or not they have state.
            anew: discard existing plans, because settings have changed.
        """
        return self.bind(anew=anew) + self._resting_plans(frozen)

    def _resting_plans(self, frozen: Collection[str] = ()) -> list[Plan]:
        """Plans of frozen parameters that have state, or whose names are given.

        Local where every process holds the parameters whole; otherwise collective.
        """
        groups = []
        for group in self._every_group:
            if len(group["params"]) != len(group["param_names"]):
                continue  # an engine's own tensors, which are never frozen
            rest = [
                (name, target)
                for name, target in zip(group["param_names"], group["params"], strict=True)
                if not target.requires_grad and (name in frozen or self.state.get(target))
            ]
            if rest:
                names, targets = map(list, zip(*rest, strict=True))
                groups.append({**group, "params": targets, "param_names": names})
        return self._bound_plans(groups, resting=True) if groups else []

    @entry_point
    def parameter_shapes(self) -> dict[str, list[int]]:
        """Full shapes of the parameters, by name, as far as they are known."""
        shapes: dict[str, list[int]] = {}
        for group in map(self._seen, self.param_groups):
            known = group.alive()
            if not known and len(group.targets) == len(group.names):
                known = list(zip(group.names, group.targets, strict=True))
            shapes |= {name: list(full_shape(parameter)) for name, parameter in known}
        return shapes

    @entry_point
    def calls_of_a_step(self) -> list[Call]:
        """The calls to :meth:`step` that the engine will make, without those that have no tensors.

        Collective: every process must call it, after the engine has taken over the parameters.
        """
        every, calls = self._all_groups(), []
        for call in step_calls([self._seen(group) for group in every]):
            groups = [{**every[i], "params": targets} for i, targets in call if targets]
            if groups:
                settings = [settings_of(group) for group in groups]
                calls.append(Call(settings, self._bound_plans(groups)))
        return calls

    def _all_groups(self) -> list[dict[str, Any]]:
        """All parameter groups, also while an engine steps some of them only."""
        if len(self.param_groups) >= len(self._every_group):
            self._every_group = self.param_groups
        return self._every_group

    def _follow_parameters(self, groups: list[dict[str, Any]], plans: list[Plan]) -> None:
        """Move state to the devices of its tensors; warn if they never have gradients."""
        for plan in plans:
            for shard in plan.shards:
                move_state(self.state_of(shard), local_part(shard.fragment.target).device)
        tensors = (tensor for group in groups for tensor in group["params"])
        self._gradients_missing.note(tensors, len(self._parameters))

    def _bound_plans(self, groups: list[dict[str, Any]], *, resting: bool = False) -> list[Plan]:
        """Plans for the tensors that the groups hold now, created on first use.

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
                self._refuse_misfits([plan for old in outdated for plan in self._plans[old]], plans)
            for old in outdated:
                del self._plans[old], self._tensors_of_plans[old]
            self._plans[key] = plans
            self._tensors_of_plans[key] = tensors  # alive, so that their ids stay theirs
        return self._plans[key]

    def _outdated(self, layouts: tuple[Layout, ...]) -> list[tuple[Layout, ...]]:
        """The plans of tensors that have changed, or that the groups no longer hold."""
        calls = step_calls([self._seen(group) for group in self._all_groups()])
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

    def _refuse_misfits(self, outdated: list[Plan], plans: list[Plan]) -> None:
        """Check, on all processes, that state fits the tensors as they are now."""
        before = {part.name: part.parameter_shape for plan in outdated for part in plan.held}
        for plan in plans:
            mine = [
                shard.fragment
                for shard in plan.shards
                if (state := self.state_of(shard))
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

    def _make_plans(self, groups: list[dict[str, Any]], *, resting: bool) -> list[Plan]:
        if not self._patterns_applied:
            raise ConfigError(
                "targets, exclude: the optimizer was built from bare parameters, which have no "
                "module names; build its groups with arg_dist.param_groups(model, targets=..., ...)"
            )
        specs = [
            group_spec(
                self._seen(group, resting=resting),
                settings_of(group),
                self._full_rank_names,
                {name: self._parameters[name].position for name in group["param_names"]},
            )
            for group in groups
        ]
        self._coverage.tell(
            self._every_group,
            self._full_rank_names,
            is_classified=self.is_classified,
            aloud=is_first_process(training_group(self.process_group)),
        )
        timeout, bucket_size = self.defaults["collective_timeout"], self.defaults["bucket_size"]
        return make_plans(specs, self._communicators, timeout, bucket_size, resting=resting)

    def _seen(self, group: dict[str, Any], *, resting: bool = False) -> ParameterGroup:
        """A group in the form that the engine adapters take.

        Raises:
            RuntimeError: parameters were added to the group's list, or removed from it.
        """
        names = group["param_names"]
        places = [self._parameters[name] for name in names]
        if places and places[0].params is group["params"] and len(places) != len(group["params"]):
            raise RuntimeError(
                f"parameter group of {names[0]}: it was built with {len(names)} parameters, and "
                f"its list has {len(group['params'])} now; to freeze a parameter use "
                "requires_grad_(False), to add one add_param_group, or build a new optimizer"
            )
        process_group = training_group(self.process_group)
        parameters = [place.parameter for place in places]
        return ParameterGroup(list(group["params"]), names, parameters, process_group, resting)
