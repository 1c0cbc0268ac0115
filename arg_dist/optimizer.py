"""The user-facing optimizer: a short ``step()`` over fragments, independent of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from arg_dist.agreement import Agreement, agree
from arg_dist.algorithm import kept_before
from arg_dist.config import AdaRankGradConfig, parse_config
from arg_dist.copying import CopiedOptimizer
from arg_dist.coverage import Coverage
from arg_dist.equality import compare
from arg_dist.group_keys import numbers, tensors
from arg_dist.parameter_groups import checked_last, complete_group, settings_of
from arg_dist.places import GradientsMissing, Layout, Place
from arg_dist.saving import Saving
from arg_dist.settings import Settings
from arg_dist.shard_step import GradientPart, computation, gradient_part, lane_of, rounds_of
from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.entry import check_not_captured, eager, entry_point
from arg_dist.sharding.fragment import adapters
from arg_dist.sharding.lanes import Lane, run_lanes
from arg_dist.sharding.plan import Plan
from arg_dist.sharding.shard import Shard
from arg_dist.state_budget import StateBudget
from arg_dist.state_dict import Ownership
from arg_dist.subspace.distributed import Steps
from arg_dist.subspace.precision import matmul_precision

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

    @entry_point
    def __init__(
        self,
        params: Iterable[Any],
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
        self._parameters: dict[str, Place] = {}
        self._plans: dict[tuple[Layout, ...], list[Plan]] = {}
        self._tensors_of_plans: dict[tuple[Layout, ...], list[Tensor]] = {}
        self._communicators: dict[Any, Communicator] = {}
        self._full_rank_names: frozenset[str] = frozenset()
        self._patterns_applied = config.targets is None and config.exclude is None
        self.is_classified = False
        self.process_group = process_group
        self._ownership = Ownership()
        self._coverage = Coverage()
        self._every_group: list[dict[str, Any]] = []
        limit = config.state_budget
        self._budget = None if limit is None else StateBudget(limit)
        self._gradients_missing = GradientsMissing()
        self.calls = 0
        self.skipped_steps = 0
        super().__init__(params, {**dict(config), **tensors(given)})
        for adapter in adapters():
            adapter.on_construction(self)

    # -- parameters and their names --------------------------------------------------------------

    @entry_point
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
        for index, name in enumerate(added["param_names"]):
            self._parameters[name] = Place(added["params"], index)
            self._coverage.add(name, added["params"][index])

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
        groups = [group for group in self.param_groups if group["params"]]
        settings = [settings_of(group) for group in groups]
        self._ownership.whole = None
        plans = self._bound_plans(groups)
        self._follow_parameters(groups, plans)
        budget = self._budget
        calls = [] if budget is None else budget.calls_that_share(plans, self.calls_of_a_step)
        self._settle(plans)
        to_share = budget is not None and budget.any_due(calls, self.state_of)
        prepared = []
        for plan in plans:
            gradients = {shard.unit: gradient_part(shard) for shard in plan.shards}
            agreement = self._agree(plan, gradients, settings, to_share)
            prepared.append((plan, gradients, agreement))
        # change nothing until every gradient of this call is known to be usable
        skip = all(each.nonfinite == "skip" for each in settings)
        usable = all([agreed.is_usable(plan.names, skip=skip) for plan, _, agreed in prepared])
        if budget is not None and any(agreed.refreshing for _, _, agreed in prepared):
            budget.share_out(calls, self.state_of, self.state)
        if usable:
            with matmul_precision("highest"):  # the job's own setting is for its model
                for plan, gradients, agreed in prepared:
                    self._update(plan, gradients, agreed, settings)
        else:
            self.skipped_steps += 1
        self.calls += 1

    @property
    def _turns(self) -> int:
        """Steps over which simultaneous early refreshes are staggered; 1 for few parameters."""
        return max(1, len(self._parameters) // RENEWED_TOGETHER)

    def _agree(
        self,
        plan: Plan,
        gradients: dict[int, GradientPart],
        settings: list[AdaRankGradConfig],
        to_share: bool,
    ) -> Agreement:
        """Agree on ``||G||^2``, finiteness and rounds of all matrices across the processes."""
        compared = compare(plan, self.state_of, settings, self.calls)
        kept, needed = [], []
        for shards in plan.shards_by_lane:
            states = [(shard, self.state_of(shard)) for shard in shards]
            needed.append(max((rounds_of(*each, settings) for each in states), default=0))
            kept += [(shard.unit, part) for shard, state in states for part in kept_before(state)]
        norms = agree(
            [(unit, gradient.norm_sq) for unit, gradient in gradients.items()],
            kept,
            needed,
            own_state=self._ownership.is_still_own(plan, self.state),
            steps=self.calls,
            units=len(plan.names),
            processes=plan.communicator.size,
            me=plan.communicator.me,
            refreshing=to_share,
            likeness=compared.likeness,
        )
        return compared.agreement(norms)

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
            budget = self._budget
            allowed = None if budget is None else budget.allowed(shard, state, chosen)
            gradient = gradients.pop(shard.unit)
            return computation(
                shard, gradient, state, agreed, chosen, turns=self._turns, allowed=allowed
            )

        shards = [shard for shard in held if self.state_of(shard) or agreed.norm_sq[shard.unit] > 0]
        return lane_of(shards, steps, settings)
