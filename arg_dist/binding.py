"""The part of the optimizer that maps its parameters to a layout."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from arg_dist.config import ConfigError
from arg_dist.groups import full_shape
from arg_dist.parameter_groups import group_spec, settings_of
from arg_dist.self_report import SelfReport
from arg_dist.sharding.communicator import training_group
from arg_dist.sharding.fragment import ParameterGroup, step_calls
from arg_dist.sharding.plan import Plan, make_plans
from arg_dist.state_budget import Call

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
    _parameters: dict[str, weakref.ref[Tensor]]
    _full_rank_names: frozenset[str]
    _patterns_applied: bool

    def parameter_names(self) -> dict[int, str]:
        """Names of the parameters the optimizer was built with, by ``id``."""
        return {id(p): name for name, ref in self._parameters.items() if (p := ref()) is not None}

    def adopt_names(self, names: Mapping[str, str], full_rank: Iterable[str]) -> None:
        """Rename parameters and keep some of them full-rank; only before the first step.

        For engines that build the optimizer from bare parameters and have the model.

        Args:
            names: new name for each old one.
            full_rank: new names of the parameters trained by full-rank Adam.
        """
        if self._plans:
            raise RuntimeError("parameters can be renamed only before the first step")
        self._parameters = {names.get(old, old): ref for old, ref in self._parameters.items()}
        for group in self.param_groups:
            group["param_names"] = [names.get(old, old) for old in group["param_names"]]
        self._full_rank_names = frozenset(full_rank)
        self._patterns_applied = True

    def bind(self, *, anew: bool = False) -> list[Plan]:
        """Plans for all tensors, as the engine will pass them to :meth:`step`.

        Collective: every process must call it, after the engine has taken over the parameters.

        Args:
            anew: discard existing plans, because settings have changed.
        """
        if anew:
            self._plans.clear()
        return [plan for call in self.calls_of_a_step() for plan in call.plans]

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

    def parameter_shapes(self) -> dict[str, list[int]]:
        """Full shapes of the parameters, by name, as far as they are known."""
        shapes: dict[str, list[int]] = {}
        for group in map(self._seen, self.param_groups):
            known = group.alive()
            if not known and len(group.targets) == len(group.names):
                known = list(zip(group.names, group.targets, strict=True))
            shapes |= {name: list(full_shape(parameter)) for name, parameter in known}
        return shapes

    def calls_of_a_step(self) -> list[Call]:
        """The calls to :meth:`step` that the engine will make, without those that have no tensors.

        Collective: every process must call it, after the engine has taken over the parameters.
        """
        if len(self.param_groups) >= len(self._every_group):
            self._every_group = self.param_groups
        every, calls = self._every_group, []
        for call in step_calls([self._seen(group) for group in every]):
            groups = [{**every[i], "params": targets} for i, targets in call if targets]
            if groups:
                settings = [settings_of(group) for group in groups]
                calls.append(Call(settings, self._bound_plans(groups)))
        return calls

    def _bound_plans(self, groups: list[dict[str, Any]], *, resting: bool = False) -> list[Plan]:
        """Plans for the tensors that the groups hold now, created on first use."""
        key = tuple((id(p), p.requires_grad) for group in groups for p in group["params"])
        key = (RESTING, *key) if resting else key
        if key not in self._plans:
            self._plans[key] = self._make_plans(groups, resting=resting)
        return self._plans[key]

    def _make_plans(self, groups: list[dict[str, Any]], *, resting: bool) -> list[Plan]:
        if not self._patterns_applied:
            raise ConfigError(
                "targets, exclude: the optimizer was built from bare parameters, which have no "
                "module names; build its groups with arg_dist.param_groups(model, targets=..., ...)"
            )
        specs = [
            group_spec(
                self._seen(group, resting=resting), settings_of(group), self._full_rank_names
            )
            for group in groups
        ]
        time_limit, bucket_size = self.defaults["time_limit"], self.defaults["bucket_size"]
        return make_plans(specs, self._communicators, time_limit, bucket_size, resting=resting)

    def _seen(self, group: dict[str, Any], *, resting: bool = False) -> ParameterGroup:
        """A group in the form that the engine adapters take."""
        parameters = [self._parameters[name]() for name in group["param_names"]]
        process_group = training_group(self.process_group)
        return ParameterGroup(
            list(group["params"]), group["param_names"], parameters, process_group, resting
        )
