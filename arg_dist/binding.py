"""The part of the optimizer that knows which parameters it has, and how they lie."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from arg_dist.config import ConfigError
from arg_dist.parameter_groups import group_spec, settings_of
from arg_dist.self_report import SelfReport
from arg_dist.sharding.communicator import training_group
from arg_dist.sharding.fragment import ParameterGroup, step_calls
from arg_dist.sharding.plan import Plan, make_plans
from arg_dist.state_budget import Call


class Binding(SelfReport):
    """The part of :class:`arg_dist.AdaRankGrad` that binds parameters to a layout.

    An engine may show :meth:`step` one parameter group at a time, the others being gone from
    `param_groups` meanwhile; `_every_group` remembers all of them.
    """

    param_groups: list[dict[str, Any]]
    _every_group: list[dict[str, Any]]
    defaults: dict[str, Any]
    process_group: Any
    _parameters: dict[str, weakref.ref[Tensor]]
    _full_rank_names: frozenset[str]
    _patterns_applied: bool

    def parameter_names(self) -> dict[int, str]:
        """Name of each parameter the optimizer was built with, by ``id``."""
        return {id(p): name for name, ref in self._parameters.items() if (p := ref()) is not None}

    def adopt_names(self, names: Mapping[str, str], full_rank: Iterable[str]) -> None:
        """Renames parameters and keeps some of them full-rank; before the first step only.

        For engines that build the optimizer from bare parameters and know the model.

        Args:
            names: new name for each old one.
            full_rank: new names of those left to full-rank Adam.
        """
        if self._plans:
            raise RuntimeError("names can be given before the first step only")
        self._parameters = {names.get(old, old): ref for old, ref in self._parameters.items()}
        for group in self.param_groups:
            group["param_names"] = [names.get(old, old) for old in group["param_names"]]
        self._full_rank_names = frozenset(full_rank)
        self._patterns_applied = True

    def bind(self, *, anew: bool = False) -> list[Plan]:
        """The plans for all tensors, as the engine is going to hand them to :meth:`step`.

        Every process must call it. The engine must have taken the parameters over.

        Args:
            anew: settings have changed, and the plans made so far may not hold any more.
        """
        if anew:
            self._plans.clear()
        return [plan for call in self.calls_of_a_step() for plan in call.plans]

    def calls_of_a_step(self) -> list[Call]:
        """The calls of :meth:`step` that have any tensors, as the engine is going to make them.

        Every process must call it. The engine must have taken the parameters over.
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

    def _bound_plans(self, groups: list[dict[str, Any]]) -> list[Plan]:
        """The plans for the tensors that the groups hold now; made when first seen."""
        key = tuple((id(p), p.requires_grad) for group in groups for p in group["params"])
        if key not in self._plans:
            self._plans[key] = self._make_plans(groups)
        return self._plans[key]

    def _make_plans(self, groups: list[dict[str, Any]]) -> list[Plan]:
        if not self._patterns_applied:
            raise ConfigError(
                "targets, exclude: the optimizer was built from bare parameters and cannot tell "
                "modules; build its groups with arg_dist.param_groups(model, targets=..., ...)"
            )
        specs = [
            group_spec(self._seen(group), settings_of(group), self._full_rank_names)
            for group in groups
        ]
        time_limit, bucket_size = self.defaults["time_limit"], self.defaults["bucket_size"]
        return make_plans(specs, self._communicators, time_limit, bucket_size)

    def _seen(self, group: dict[str, Any]) -> ParameterGroup:
        """A group as the engines' adapters see it."""
        parameters = [self._parameters[name]() for name in group["param_names"]]
        process_group = training_group(self.process_group)
        return ParameterGroup(
            list(group["params"]), group["param_names"], parameters, process_group
        )
