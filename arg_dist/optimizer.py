"""The user-facing optimizer: a short ``step()`` over fragments, independent of the engine."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from arg_dist.agreement import Agreement, agree
from arg_dist.algorithm import State, is_due, rounds
from arg_dist.binding import Binding
from arg_dist.config import AdaRankGradConfig, parse_config
from arg_dist.custody import Custody
from arg_dist.group_keys import numbers, tensors
from arg_dist.parameter_groups import (
    check_names,
    checked_last,
    complete_group,
    keep_newer,
    members,
    settings_of,
)
from arg_dist.saved_forms import WHOLE, whole_state
from arg_dist.shard_step import GradientPart, computation, gradient_part, lane_of
from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.drivers import run
from arg_dist.sharding.fragment import ADAPTERS
from arg_dist.sharding.lanes import Lane, run_lanes
from arg_dist.sharding.plan import Plan
from arg_dist.sharding.shard import MatrixShard, Shard
from arg_dist.sharding.waiting import named
from arg_dist.state import copy_state
from arg_dist.state_budget import Call, StateBudget
from arg_dist.subspace.exchange import Steps
from arg_dist.subspace.precision import matmul_precision

RENEWED_TOGETHER = 2
"""At least this many parameters may refresh early in one step; further ones are staggered."""


class AdaRankGrad(Binding, torch.optim.Optimizer):
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
        params: parameters, ``(name, parameter)`` pairs, or groups; preferably from
            :func:`arg_dist.param_groups`, which separates embeddings and head from the rest.
            Without names, every tensor of two or more dimensions is a matrix.
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

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        process_group: Any = "world",
        **settings: Any,
    ) -> None:
        given = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **settings)
        config = parse_config(numbers(given))
        self._parameters: dict[str, weakref.ref[Tensor]] = {}
        self._plans: dict[tuple[tuple[int, bool], ...], list[Plan]] = {}
        self._communicators: dict[Any, Communicator] = {}
        self._full_rank_names: frozenset[str] = frozenset()
        self._patterns_applied = config.targets is None and config.exclude is None
        self.is_classified = False
        self.process_group = process_group
        self._custody = Custody()
        self._every_group: list[dict[str, Any]] = []
        self._budget = StateBudget(config.state_budget)
        self.calls = 0
        self.skipped_steps = 0
        super().__init__(params, {**dict(config), **tensors(given)})
        for adapter in ADAPTERS:
            adapter.on_construction(self)

    # -- parameters and their names --------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its settings are validated like the optimizer's own.

        Keys that other libraries put into groups, such as ``name`` or ``lr_scale``, are kept.

        Raises:
            ConfigError: a setting of the group is misspelled or invalid, a name occurs twice, or a
                parameter is of a kind that cannot be trained.
            TypeError: the parameters are a set.
        """
        position = len(self.param_groups)
        self.is_classified |= "low_rank" in param_group
        super().add_param_group(complete_group(param_group, position, self.defaults))
        added = checked_last(self.param_groups, self._parameters)
        self._every_group = self.param_groups
        for name, parameter in zip(added["param_names"], added["params"], strict=True):
            self._parameters[name] = weakref.ref(parameter)

    # -- the step --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step on every tensor that the groups hold now.

        Raises:
            NoAnswerError: another process did not join a collective within `time_limit` seconds,
                or has terminated.
            ConfigError: `state_budget` is too small for the smallest ranks; on every process.
            FloatingPointError: a gradient is NaN or infinite and ``nonfinite="error"``; raised on
                every process of the group. Weights and state of this call are unchanged (an engine
                may call once per parameter group).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [group for group in self.param_groups if group["params"]]
        settings = [settings_of(group) for group in groups]
        self._custody.whole = None
        plans = self._bound_plans(groups)
        calls = self._calls_that_share_a_budget(plans)
        for plan in plans:
            self._custody.cut_loaded(plan, self.state)
        any_due, prepared = self._budget.any_due(calls, self.state_of), []
        for plan in plans:
            gradients = {shard.unit: gradient_part(shard) for shard in plan.shards}
            agreement = self._agree(plan, gradients, settings, any_due)
            prepared.append((plan, gradients, agreement))
        # change nothing until every gradient of this call is known to be usable
        skip = all(each.nonfinite == "skip" for each in settings)
        usable = all([agreed.is_usable(plan.names, skip=skip) for plan, _, agreed in prepared])
        if any(agreed.refreshing for _, _, agreed in prepared):
            self._budget.share_out(calls, self.state_of, self.state)
        if usable:
            with matmul_precision("highest"):  # the job's own setting is for its model
                for plan, gradients, agreed in prepared:
                    self._update(plan, gradients, agreed, settings)
        else:
            self.skipped_steps += 1
        self.calls += 1
        return loss

    def _calls_that_share_a_budget(self, plans: list[Plan]) -> list[Call]:
        """All calls of the step if `plans` are its first call's; empty otherwise or unbudgeted."""
        if self._budget.limit is None:
            return []
        calls = self.calls_of_a_step()
        if not calls or calls[0].plans is not plans:
            return []
        self._budget.forget()
        return calls

    @property
    def _turns(self) -> int:
        """Steps over which simultaneous early refreshes are staggered; 1 for few parameters."""
        return max(1, len(self._parameters) // RENEWED_TOGETHER)

    def _agree(
        self,
        plan: Plan,
        gradients: dict[int, GradientPart],
        settings: list[AdaRankGradConfig],
        any_due: bool,
    ) -> Agreement:
        """Agree on ``||G||^2``, finiteness and rounds of all matrices across the processes."""
        kept, needed = [], []
        for shards in plan.shards_by_lane:
            needed.append(max((self._rounds_of(shard, settings) for shard in shards), default=0))
            states = [(shard.unit, self.state_of(shard)) for shard in shards]
            kept += [(unit, state["kept_sq"]) for unit, state in states if "kept_sq" in state]
        norms = agree(
            [(unit, gradient.norm_sq) for unit, gradient in gradients.items()],
            kept,
            needed,
            own_state=self._custody.is_own(plan, self.state),
            steps=self.calls,
            units=len(plan.names),
            processes=plan.communicator.size,
            me=plan.communicator.me,
            refreshing=any_due,
        )
        return run([norms], plan.communicator, 1, "the sum of norms", [named(plan.names)])[0]

    def _update(
        self,
        plan: Plan,
        gradients: dict[int, GradientPart],
        agreed: Agreement,
        settings: list[AdaRankGradConfig],
    ) -> None:
        """Run the algorithm on every shard."""
        lanes = [
            partial(self._lane, shards, gradients, agreed, settings)
            for shards in plan.shards_by_lane
        ]
        run_lanes(lanes, plan.communicator, agreed.rounds)

    def _rounds_of(self, shard: Shard, settings: list[AdaRankGradConfig]) -> int:
        """Communication rounds that a shard's step may take."""
        if not shard.is_shared or not isinstance(shard, MatrixShard):
            return int(shard.is_shared)
        chosen, relayed = settings[shard.group], shard.spread.is_relayed
        steady, refreshing = rounds(chosen.power_passes, chosen.residual, relayed=relayed)
        return refreshing if is_due(self.state_of(shard)) else steady

    def _lane(
        self,
        held: list[Shard],
        gradients: dict[int, GradientPart],
        agreed: Agreement,
        settings: list[AdaRankGradConfig],
    ) -> Lane[Any]:
        """The steps of a lane's shards, without those that never had a gradient."""

        def steps(shard: Shard) -> Steps[Any]:
            state, chosen = self.state_of(shard), settings[shard.group]
            allowed = self._budget.allowed(shard, state, chosen)
            gradient = gradients.pop(shard.unit)
            return computation(
                shard, gradient, state, agreed, chosen, turns=self._turns, allowed=allowed
            )

        shards = [shard for shard in held if self.state_of(shard) or agreed.norm_sq[shard.unit] > 0]
        return lane_of(shards, steps, settings)

    # -- saving ------------------------------------------------------------------------------------

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather sharded state on one process, for a checkpoint that only this process writes.

        For replicated parameters; a no-op under engines that shard them. Collective: every process
        must call it. Until the next step, :meth:`state_dict` on process `to` returns the whole
        state, which any number of processes can load.

        Args:
            to: index in the group of the process that writes; it needs CPU memory for the whole
                state, and device memory for one matrix at a time.
        """
        self._custody.whole = (WHOLE, {})
        for plan in self.every_plan():
            for shard in plan.shards if plan.replicated else ():
                part = whole_state(shard, self.state_of(shard), to=to)
                purpose = "consolidate_state_dict"
                state = run([part], plan.communicator, 1, purpose, [shard.name])[0]
                self._custody.keep_whole(plan, shard, state, to)

    def state_dict(self) -> dict[str, Any]:
        """Return this process's state, marked with the process it belongs to.

        Raises:
            RuntimeError: the model is replicated and the state sharded, but
                :meth:`consolidate_state_dict` has not been called since the last step.
        """
        targets, plans = members(self.param_groups), list(self.every_plan())

        def mark(_: Any, saved: dict[str, Any]) -> None:
            self._custody.prepare_saving(saved, self.calls, targets, plans)

        # before the hooks of others, which see what is saved
        with self.register_state_dict_post_hook(mark, prepend=True):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a :meth:`state_dict`; unlike in torch, every tensor keeps its dtype.

        State is sharded: if a process loads another process's state, the next step raises a
        RuntimeError.
        """
        before, found = [dict(group) for group in self.param_groups], dict[str, Any]()

        def keep(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
            check_names(self.param_groups, saved["param_groups"])
            found.update(saved)
            return {**saved, "state": {}}

        def finish(_: Any) -> None:
            self._load_own(found, before)

        # between the hooks of others: they see what is loaded, and the result
        last = self.register_load_state_dict_pre_hook(keep)
        with last, self.register_load_state_dict_post_hook(finish, prepend=True):
            super().load_state_dict(state_dict)

    def _load_own(self, saved: Mapping[str, Any], before: list[dict[str, Any]]) -> None:
        """Complete the groups that torch has loaded, and load the state."""
        self._every_group = self.param_groups
        keep_newer(self.param_groups, before)
        indexes = members(saved["param_groups"])
        targets = dict(zip(indexes, members(self.param_groups), strict=False))
        loaded = self._custody.load(saved, targets, list(self.every_plan()))
        self.calls = loaded.calls
        for target, units in loaded.states.items():
            self.state[target] = copy_state(units, target.device)

    def replace_state(
        self, states: Mapping[Tensor, dict[str, State]], calls: int, skipped_steps: int
    ) -> None:
        """Replace this process's state.

        Args:
            states: for each tensor that :meth:`bind` found, the states of its matrices and tensors
                by name.
            calls: calls to :meth:`step` so far; equal on all processes.
            skipped_steps: how many of them skipped the step.
        """
        self._custody = Custody()
        self.state.clear()
        self.state.update(states)
        self.calls, self.skipped_steps = calls, skipped_steps
