"""Gradients that are projected as soon as the backward pass has completed them, and freed.

For ``gradient_budget``. A hook of each matrix adds ``G Q``, and the residual in few bits, to the
sum over micro-batches, so that gradients of only few matrices exist at a time. A matrix without a
basis, or whose basis is due, needs its gradient whole; these take turns that fit into the budget:
until its turn comes, the former does not train, and the latter keeps its basis.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from arg_dist.algorithm import age, basis_of, is_due, postpone, stored_basis
from arg_dist.config import AdaRankGradConfig
from arg_dist.parameter_groups import settings_of, trained_views
from arg_dist.sharding.drivers import run_local
from arg_dist.sharding.entry import entry_point
from arg_dist.sharding.shard import MatrixShard
from arg_dist.step import gradient_parts, own_sketch
from arg_dist.subspace.state import State
from arg_dist.terms import Projected, own_term

if TYPE_CHECKING:
    from arg_dist.optimizer import AdaRankGrad

Groups = Iterable[Mapping[str, Any]]

_OWNERS: MutableMapping[Tensor, Any] = WeakTensorKeyDictionary()
"""By parameter, whose hook projects its gradient: that of the optimizer built last."""


class BackwardProjection:
    """What backward passes have projected since the last step of an optimizer.

    Args:
        optimizer: it is not kept alive.
        budget: bytes of gradients that may stay whole.

    Attributes:
        has_seen_some: whether there has been a gradient, even if it was dropped.
    """

    def __init__(self, optimizer: AdaRankGrad, budget: int) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._budget = budget
        self._hooks: dict[int, Any] = {}
        self._projected: dict[str, Projected] = {}
        self._turn: Turn | None = None
        self._last_turns: dict[int, int] = {}
        self.has_seen_some = False

    @classmethod
    def of(cls, optimizer: Any) -> BackwardProjection | None:
        """That of an optimizer with a `gradient_budget`, or None."""
        budget = optimizer.defaults["gradient_budget"]
        if budget is None:
            return None
        projection = cls(optimizer, budget)
        projection.follow(optimizer.param_groups)
        return projection

    def follow(self, groups: Groups) -> None:
        """Hook the matrices that the groups hold now, and no others."""
        held = {id(parameter): parameter for parameter in _matrices(groups)}
        for key in self._hooks.keys() - held.keys():
            self._hooks.pop(key).remove()
        for key in held.keys() - self._hooks.keys():
            _OWNERS[held[key]] = owner = weakref.ref(self)
            hook = _hook_of(owner)
            register: Callable[..., Any] = held[key].register_post_accumulate_grad_hook
            self._hooks[key] = register(hook)

    def tensors(self) -> list[Tensor]:
        """All that has been projected."""
        terms = [projected.term for projected in self._projected.values()]
        parts = [(t.projected, t.size, *(t.residual or ())) for t in terms]
        return [tensor for each in parts for tensor in each if tensor is not None]

    def take(self) -> Mapping[str, Projected]:
        """What has been projected, by name of the matrix; the next gradient begins anew."""
        projected, self._projected, self._turn = self._projected, {}, None
        return projected

    @entry_point
    def project(self, parameter: Tensor) -> None:
        """Project the gradient of a parameter and free it, unless it stays whole in this turn."""
        optimizer = self._optimizer()
        if optimizer is None or parameter.grad is None:
            return
        self.has_seen_some = True
        if self._turn is None:
            self._turn = Turn.of(optimizer, self._budget, self._last_turns)
        if id(parameter) in self._turn.whole:
            return
        for shard in self._turn.projected.get(id(parameter), ()):
            settings, state = self._turn.settings[shard.group], optimizer.state_of(shard)
            before = self._projected.pop(shard.name, None)
            steps = optimizer.calls
            self._projected[shard.name] = _projected(shard, state, settings, steps, before)
        parameter.grad = None


def _hook_of(owner: weakref.ref[BackwardProjection]) -> Any:
    def hook(parameter: Tensor) -> None:
        projection = owner()
        if projection is not None and _OWNERS.get(parameter) is owner:
            projection.project(parameter)

    return hook


def _matrices(groups: Groups) -> Iterator[Tensor]:
    """The parameters that are trained in low rank, as far as their groups tell."""
    for group in groups:
        settings, names = settings_of(group), group["param_names"]
        if len(names) != len(group["params"]):
            continue  # an engine has flattened them
        for name, parameter in zip(names, group["params"], strict=True):
            is_real = parameter.requires_grad and not parameter.is_complex()
            if is_real and trained_views(name, tuple(parameter.shape), settings):
                yield parameter


def _projected(
    shard: MatrixShard,
    state: State,
    settings: AdaRankGradConfig,
    steps: int,
    before: Projected | None,
) -> Projected:
    """The gradient that a matrix has now, added to those of the micro-batches before."""
    part, basis = gradient_parts([shard])[shard.unit], stored_basis(state)
    assert basis is not None
    sketch = None if settings.max_grad_norm is None else own_sketch(shard, steps)
    earlier = None if before is None else before.term
    term = run_local(own_term(part.read, basis_of(state), shard.sharding, settings, earlier))
    if before is None:
        return Projected(term, part.norm_sq, 1, basis, sketch)
    # ||G_1 + ... + G_k||^2 <= k (||G_1||^2 + ... + ||G_k||^2)
    count = before.micro_batches + 1
    norm_sq = count * (before.norm_sq / before.micro_batches + part.norm_sq)
    if sketch is not None and before.sketch is not None:
        sketch += before.sketch
    return Projected(term, norm_sq, count, basis, sketch)


@dataclass(frozen=True)
class Turn:
    """What the backward passes until the next step do with each gradient.

    Attributes:
        whole: parameters whose gradients stay whole, by ``id``.
        projected: the matrices of those whose gradients are projected, by ``id``. Any other is
            dropped: it has no basis yet.
        settings: of the parameter groups.
    """

    whole: set[int]
    projected: dict[int, list[MatrixShard]]
    settings: list[AdaRankGradConfig]

    @classmethod
    def of(cls, optimizer: AdaRankGrad, budget: int, last: dict[int, int]) -> Turn:
        """Those without a basis, or whose basis is due, as many as fit, but at least one.

        Equal on all processes. Any other basis that is due is used for one more step.

        Args:
            optimizer: the optimizer.
            budget: bytes of their gradients.
            last: by ``id`` the step in which a parameter has had its turn, updated: those without
                come first, and then the oldest, as some may never have a gradient.
        """
        groups = [group for group in optimizer.param_groups if group["params"]]
        matrices: dict[int, list[MatrixShard]] = {}
        whole = set()
        for plan in optimizer.every_plan():
            for shard in plan.shards:
                if isinstance(shard, MatrixShard):
                    matrices.setdefault(id(shard.fragment.target), []).append(shard)
                else:
                    whole.add(id(shard.fragment.target))
        waiting: list[tuple[int, float, Tensor, list[State]]] = []
        for parameter in _matrices(groups):
            if id(parameter) not in matrices and optimizer.state.get(parameter):
                whole.add(id(parameter))  # what was loaded is bound in the next step
            states = [optimizer.state_of(shard) for shard in matrices.get(id(parameter), ())]
            if id(parameter) not in whole and (not states or any(map(is_due, states))):
                oldest = max(map(age, states), default=math.inf)
                waiting.append((last.get(id(parameter), -1), -oldest, parameter, states))
        left = budget
        for _, _, parameter, states in sorted(waiting, key=lambda each: each[:2]):
            size = parameter.numel() * parameter.element_size()
            if size <= left or left == budget:
                whole.add(id(parameter))
                last[id(parameter)] = optimizer.calls
                left -= size
                continue
            for state in states:
                postpone(state)
        ready = {
            key: shards
            for key, shards in matrices.items()
            if all(optimizer.state_of(shard) for shard in shards)
        }
        return cls(whole, ready, [settings_of(group) for group in groups])
