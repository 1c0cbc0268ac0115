"""The part of the optimizer that maps its parameters to a layout."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from arg_dist.config import ConfigError
from arg_dist.coverage import Coverage
from arg_dist.parameter_groups import group_spec, settings_of
from arg_dist.self_report import SelfReport
from arg_dist.sharding.communicator import training_group
from arg_dist.sharding.fragment import ParameterGroup, step_calls
from arg_dist.sharding.job import is_first_process
from arg_dist.sharding.plan import Plan, make_plans
from arg_dist.state_budget import Call
from arg_dist.uses import Use


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
    _coverage: Coverage
    is_classified: bool

    def parameter_names(self) -> dict[int, str]:
        """Names of the parameters the optimizer was built with, by ``id``."""
        return {id(p): name for name, ref in self._parameters.items() if (p := ref()) is not None}

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
        if self._plans:
            raise RuntimeError("parameters can be renamed only before the first step")
        self._parameters = {names.get(old, old): ref for old, ref in self._parameters.items()}
        for group in self.param_groups:
            group["param_names"] = [names.get(old, old) for old in group["param_names"]]
        self._coverage.rename(names, uses or {})
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

    def _bound_plans(self, groups: list[dict[str, Any]]) -> list[Plan]:
        """Plans for the tensors that the groups hold now, created on first use."""
        key = tuple((id(p), p.requires_grad) for group in groups for p in group["params"])
        if key not in self._plans:
            self._plans[key] = self._make_plans(groups)
        return self._plans[key]

    def _make_plans(self, groups: list[dict[str, Any]]) -> list[Plan]:
        if not self._patterns_applied:
            raise ConfigError(
                "targets, exclude: the optimizer was built from bare parameters, which have no "
                "module names; build its groups with arg_dist.param_groups(model, targets=..., ...)"
            )
        specs = [
            group_spec(self._seen(group), settings_of(group), self._full_rank_names)
            for group in groups
        ]
        self._coverage.tell(
            self._every_group,
            self._full_rank_names,
            is_classified=self.is_classified,
            aloud=is_first_process(training_group(self.process_group)),
        )
        time_limit, bucket_size = self.defaults["time_limit"], self.defaults["bucket_size"]
        return make_plans(specs, self._communicators, time_limit, bucket_size)

    def _seen(self, group: dict[str, Any]) -> ParameterGroup:
        """A group in the form that the engine adapters take."""
        parameters = [self._parameters[name]() for name in group["param_names"]]
        process_group = training_group(self.process_group)
        return ParameterGroup(
            list(group["params"]), group["param_names"], parameters, process_group
        )
