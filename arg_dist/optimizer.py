"""The user-facing optimizer: a short ``step()`` over plans, independent of the engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from arg_dist.backward import BackwardProjection
from arg_dist.binding import Binding, GradientsMissing, state_of
from arg_dist.config import AdaRankGradConfig, parse_config
from arg_dist.copying import CopiedOptimizer
from arg_dist.equality import compare
from arg_dist.group_keys import numbers, tensors
from arg_dist.model_groups import param_groups
from arg_dist.parameter_groups import checked_last, complete_group, settings_of
from arg_dist.saving import Saving
from arg_dist.settings import Settings
from arg_dist.sharding.entry import (
    check_no_scaler,
    check_not_captured,
    eager,
    entry_point,
    expect_every_step,
)
from arg_dist.sharding.fragment import adapters
from arg_dist.sharding.plan import Plan
from arg_dist.sharding.shard import Shard
from arg_dist.state import move_state
from arg_dist.state_budget import Call, StateBudget
from arg_dist.state_dict import Ownership
from arg_dist.step import PlanStep
from arg_dist.subspace.products import matmul_precision
from arg_dist.subspace.state import State
from arg_dist.telemetry import held_elements, matrix_figures, storage_bytes
from arg_dist.terms import Projected
from arg_dist.uses import Use

RENEWED_TOGETHER = 2
"""At least this many parameters may refresh early in one step; further ones are staggered."""


class AdaRankGrad(Saving, CopiedOptimizer):
    """Adam in an adaptive low-rank subspace of each gradient (arXiv 2410.17881), sharded.

    Each matrix ``G`` has a basis ``Q`` on its shorter side. One call to :meth:`step` processes all
    its matrices together:

    ===================== ==================================== ====================================
    phase                 computes                             sends, in one collective per round
    ===================== ==================================== ====================================
    agree                 ``||G||^2``; is every gradient       two numbers per matrix
                          finite; is a refresh due
    refresh (when due)    sketch, power passes, energies,      each sketch to its home process,
                          rank, basis; transport of the        bases back; ``l x l`` and ``r x r``
                          moments                              products
    project               ``P = G Q``                          sharded bases; partial rows of ``P``
    Adam                  ``M, V, N`` on ``P``                 nothing
    update                ``W -= lr scale (N Q^T + phi S)``    rows of ``N`` and ``phi`` that other
                                                               processes update
    ===================== ==================================== ====================================

    ``S = G - P Q^T`` is the part of the gradient outside the basis; ``phi`` scales each of its rows
    (:mod:`arg_dist.subspace.residual`). Matrices are batched into lanes of half a `bucket_size` of
    weights; the number of collectives does not depend on the number of matrices in a lane. While
    one lane's messages are in flight, another lane and the matrices that one process holds whole
    (these communicate only in the agree phase) compute. Under a sharding engine, the optimizer
    locates its fragments at the first step; build it before or after the engine takes over the
    model, but before the engine replaces the parameters.

    Args:
        params: the model, or groups from :func:`arg_dist.param_groups`: embeddings and head are
            then full-rank, and the other matrices low-rank. Of parameters, or pairs of names and
            parameters, embeddings and head are recognized as far as their names say so, or without
            names their shapes; every other tensor of two or more dimensions is a matrix.
        lr: learning rate; a tensor stays one, and is read at every step.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        process_group: without a sharding engine, the processes that train this model together,
            with equal weights and averaged gradients; work and state are sharded over them.
            "world": all processes of the job; None: this process trains a model of its own.
        **settings: the other fields of :class:`arg_dist.AdaRankGradConfig`.

    Raises:
        ConfigError: a setting is unknown, ill-typed or out of range, here or in a group.
    """

    @entry_point
    def __init__(
        self,
        params: Iterable[Any] | torch.nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.0,
        *,
        process_group: Any = "world",
        **settings: Unpack[Settings],
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        given = {**adam, **settings}
        config = parse_config(numbers(given))
        patterns_applied = config.targets is None and config.exclude is None
        if isinstance(params, torch.nn.Module):
            params = param_groups(params, targets=config.targets, exclude=config.exclude)
            patterns_applied = True
        self._binding = Binding(
            process_group, patterns_applied=patterns_applied, all_chosen="low_rank" in settings
        )
        self._ownership = Ownership()
        limit = config.state_budget
        self._budget = None if limit is None else StateBudget(limit)
        self._gradients_missing = GradientsMissing()
        self._has_stepped = False
        self.calls = 0
        self.skipped_steps = 0
        super().__init__(params, {**dict(config), **tensors(given)})
        self._backward = BackwardProjection.of(self)
        if config.gradient_sync == "sketch":
            expect_every_step(self)
        for adapter in adapters():
            adapter.on_construction(self)

    @entry_point
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its settings are validated like the optimizer's own.

        Keys that other libraries put into groups, such as ``name`` or ``lr_scale``, are kept. A
        group that was removed may be put back with other tensors, as Composer does when it shards.

        Raises:
            ConfigError: a setting of the group is misspelled or invalid, a name occurs twice, or a
                parameter is of a kind that cannot be trained.
            TypeError: the parameters are a set.
        """
        binding = self._binding
        group = complete_group(param_group, len(self.param_groups), self.defaults)
        super().add_param_group(group)
        added = checked_last(self.param_groups, binding.taken_names(self.param_groups))
        binding.follow(self.param_groups)
        binding.add(added, is_classified="low_rank" in param_group)

    # -- the step --------------------------------------------------------------------------------

    @eager
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step on every tensor that the groups hold now.

        `closure` runs in the modes of the caller (autocast, default device and the like), the step
        in none of them.

        Raises:
            NoAnswerError: another process did not join a collective within `collective_timeout`
                seconds, or has terminated.
            ConfigError: `state_budget` is too small for the smallest ranks; on every process. Or a
                parameter was made in inference mode, or has no values (meta device).
            RuntimeError: gradients, weights or settings differ between processes; on all of them.
            FloatingPointError: a gradient is NaN or infinite and ``nonfinite="error"``; raised on
                every process of the group. Weights and state of this call are unchanged (an engine
                may call once per parameter group).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step()
        return loss

    @entry_point
    def _take_step(self) -> None:
        check_not_captured()
        check_no_scaler(self)
        groups = [group for group in self.param_groups if group["params"]]
        settings = [settings_of(group) for group in groups]
        plans = self._plans_of_step(groups)
        projected: Mapping[str, Projected] = {}
        if self._backward is not None:
            self._backward.follow(groups)
            projected = self._backward.take()
        budget = self._budget
        calls = [] if budget is None else budget.calls_that_share(plans, self.calls_of_a_step)
        to_share = budget is not None and budget.any_due(calls, self.state_of)
        steps = [self._prepared(plan, settings, to_share, projected) for plan in plans]
        # change nothing until every gradient of this call is known to be usable
        skip = all(each.nonfinite == "skip" for each in settings)
        usable = all([each.agreed.is_usable(each.plan.names, skip=skip) for each in steps])
        if any(any(each.agreed.norm_sq) for each in steps):
            self._gradients_missing.calls = 0
        elif self._backward is None or not self._backward.has_seen_some:
            self._gradients_missing.note(groups, self._binding.count)
        allowed = None
        if budget is not None:
            allowed = budget.allowed
            if any(each.agreed.refreshing for each in steps):
                budget.share_out(calls, self.state_of, self.state)
        if usable:
            with matmul_precision("highest"):  # the job's own setting is for its model
                for each in steps:
                    each.take(allowed)
        else:
            self.skipped_steps += 1
        self.calls += 1

    @entry_point
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, and what backward passes have projected of them.

        Args:
            set_to_none: as in ``torch.optim.Optimizer``.
        """
        super().zero_grad(set_to_none)
        if self._backward is not None:
            self._backward.take()

    def _plans_of_step(self, groups: list[dict[str, Any]]) -> list[Plan]:
        """Plans of the tensors that the groups hold now, with their state cut and in its place."""
        if not self._has_stepped:
            self._has_stepped = True
            for adapter in adapters():
                adapter.on_first_step(self)
        self._binding.follow(self.param_groups)
        self._ownership.whole = None
        plans = self._binding.plans(groups, self.state)
        if self._ownership.uncut:
            self._cut_loaded(plans)
        for plan in plans:
            for unit in plan.keys_only:
                self.state[unit.fragment.target].setdefault(unit.name, {})
        return plans

    def _prepared(
        self,
        plan: Plan,
        settings: list[AdaRankGradConfig],
        to_share: bool,
        projected: Mapping[str, Projected],
    ) -> PlanStep:
        """A step on a plan, agreed between all processes."""
        states = {shard.unit: state_of(shard, self.state) for shard in plan.shards}
        for shard in plan.shards:
            if shard.is_elsewhere(states[shard.unit]):
                move_state(states[shard.unit], shard.fragment.target.device)
        checks: dict[str, Any] = {}
        if not plan.is_alone:
            comparison = compare(plan, states, settings, self.calls)
            checks = {"likeness": comparison.likeness, "reach": comparison.agreement}
        ownership = self._ownership
        return PlanStep.prepared(
            plan,
            states,
            settings,
            max(1, self._binding.count // RENEWED_TOGETHER),
            own_state=plan in ownership.known_own or ownership.is_own_now(plan, self.state),
            steps=self.calls,
            refreshing=to_share,
            projected=projected,
            **checks,
        )

    # -- for engines and checkpoints -------------------------------------------------------------

    @property
    def process_group(self) -> Any:
        """The processes that train this model together, without a sharding engine."""
        return self._binding.process_group

    @process_group.setter
    def process_group(self, process_group: Any) -> None:
        self._binding.process_group = process_group

    @property
    def is_classified(self) -> bool:
        """Whether the groups say which parameters are trained in low rank."""
        return self._binding.is_classified

    @entry_point
    def parameter_names(self) -> dict[int, str]:
        """Names of the parameters the optimizer was built with, by ``id``."""
        return {id(parameter): name for name, parameter in self._binding.parameters.items()}

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
        if any(self.every_plan()) or any(self.state.values()):  # state is kept by name
            raise RuntimeError(
                "parameters can be renamed only before the first step; pass a new optimizer "
                "without state to the engine, then load the state"
            )
        self._binding.rename(names, full_rank, uses or {})
        for group in self.param_groups:
            group["param_names"] = [names.get(old, old) for old in group["param_names"]]

    @entry_point
    def parameter_shapes(self) -> dict[str, list[int]]:
        """Full shapes of the parameters, by name, as far as they are known."""
        return self._binding.shapes(self.param_groups)

    @entry_point
    def bind(self, *, anew: bool = False) -> list[Plan]:
        """Plans for all tensors, as the engine will pass them to :meth:`step`.

        Collective: every process must call it, after the engine has taken over the parameters.

        Args:
            anew: discard existing plans, because settings have changed.
        """
        if anew:
            self._binding.forget_plans()
        return [plan for call in self.calls_of_a_step() for plan in call.plans]

    @entry_point
    def bind_all(self, *, frozen: Collection[str] = (), anew: bool = False) -> list[Plan]:
        """Plans of all that is saved: tensors that train, and frozen parameters that have state.

        Collective: every process must call it, after the engine has taken over the parameters.

        Args:
            frozen: names of frozen parameters to include whether or not they have state.
            anew: discard existing plans, because settings have changed.
        """
        if anew:
            self._binding.forget_plans()
        return self._binding.plans_of_state(self.param_groups, self.state, frozen)

    @entry_point
    def calls_of_a_step(self) -> list[Call]:
        """The calls to :meth:`step` that the engine will make, without those that have no tensors.

        Collective: every process must call it, after the engine has taken over the parameters.
        """
        return self._binding.calls_of_a_step(self.param_groups, self.state)

    def every_plan(self) -> Iterator[Plan]:
        """All plans made so far."""
        return self._binding.every_plan()

    def state_of(self, shard: Shard) -> State:
        """This process's part of a matrix's or tensor's state; empty before its first step."""
        return state_of(shard, self.state)

    # -- figures ---------------------------------------------------------------------------------

    @entry_point
    def stats(self) -> list[dict[str, Any]]:
        """One entry for each matrix of which this process holds state.

        Keys: name, shape, side, rank, energy (share of the gradient kept at the last refresh),
        steps_since_refresh, refreshes, state_bytes (on this process).
        """
        return matrix_figures(self.every_plan(), self.state_of)

    @entry_point
    def state_bytes(self) -> int:
        """Bytes of optimizer state on this process, counted as whole storages, not views."""
        return storage_bytes(list(self.state.values()))

    @entry_point
    def comm_bytes(self) -> int:
        """Bytes sent by this process in the optimizer's collectives since it was built."""
        return sum(each.sent_bytes for each in self._binding.communicators.values())

    @entry_point
    def collectives(self) -> int:
        """Collectives of the optimizer on this process since it was built."""
        return sum(each.collectives for each in self._binding.communicators.values())

    @entry_point
    def held_elements(self) -> int:
        """Numbers (a complex element has two) that the engine assigns to this optimizer."""
        return held_elements(self.every_plan())
