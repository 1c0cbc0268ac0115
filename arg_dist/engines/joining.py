"""``join()`` of DDP: a process without further batches still takes part in the optimizer's steps.

Inside ``ddp.join()`` or ``Join([ddp, optimizer])``, a process that has joined mirrors the others'
collectives. In each turn it takes part in a sum of ones, one from each process that begins a
forward pass. Here, processes that begin a step of an AdaRankGrad add -1 each instead: so the joined
ones know that a step comes, however many micro-batches it has. They step with the gradients and
settings of a process that has not joined.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from arg_dist.config import ConfigError
from arg_dist.engines.patching import wrap_method
from arg_dist.library_internals import (
    JOIN_BUILT,
    JOIN_COUNTED,
    JOIN_DEVICE,
    JOIN_EXITED,
    JOIN_GROUP,
)
from arg_dist.parameter_groups import SETTINGS, members
from arg_dist.sharding.communicator import Communicator, training_group
from arg_dist.subspace.distributed import Exchange

_BUILT: list[weakref.ref[Any]] = []
"""Every AdaRankGrad that may be alive, in the order in which they were built."""
_CONTEXTS: weakref.WeakKeyDictionary[Any, JoinedSteps] = weakref.WeakKeyDictionary()
"""Contexts in which an AdaRankGrad trains the models."""


def support_join(optimizer: Any) -> None:
    """Lets the optimizer take part in join contexts that are entered later."""
    _BUILT[:] = [built for built in _BUILT if built() is not None] + [weakref.ref(optimizer)]
    if not dist.is_available():
        return
    from torch.distributed.algorithms.join import Join

    wrap_method(Join, JOIN_BUILT, _built)
    wrap_method(Join, JOIN_EXITED, _exited)
    wrap_method(Join, JOIN_COUNTED, _counted)


class JoinedSteps:
    """The steps of one join context.

    Args:
        optimizers: those that train its models, in an order equal on all processes.
        group: the processes.
        device: device of the context's own messages.
    """

    def __init__(
        self, optimizers: Sequence[Any], group: dist.ProcessGroup, device: torch.device
    ) -> None:
        self._optimizers = list(optimizers)
        self._group, self._device = group, device
        limit = max(float(each.defaults["collective_timeout"]) for each in optimizers)
        self._communicator = Communicator(group, limit)
        self._has_joined = False
        self._hooks = [each.register_step_pre_hook(self._announce) for each in optimizers]

    def close(self) -> None:
        """Ends the context."""
        for hook in self._hooks:
            hook.remove()

    def follow(self) -> None:
        """Takes the step that the others have announced, on a process that has joined."""
        self._has_joined = True
        optimizer, gradients = self._lent(None)
        parameters = members(optimizer.param_groups)
        own = [parameter.grad for parameter in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        try:
            optimizer.step()
        finally:
            for parameter, gradient in zip(parameters, own, strict=True):
                parameter.grad = gradient

    def _announce(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Before a step: tells the processes that have joined, and lends them what they need."""
        if self._has_joined:
            return
        active = torch.full((1,), -1.0, dtype=torch.float32, device=self._device)
        dist.all_reduce(active, group=self._group)
        if active.item() > -self._communicator.size:
            self._lent(optimizer)

    @torch.no_grad()
    def _lent(self, stepping: Any) -> tuple[Any, list[Tensor]]:
        """The optimizer that steps, and the gradients of the first process that has not joined.

        Args:
            stepping: the optimizer that steps; None on a process that has joined.
        """
        own = None
        if stepping is not None:
            settings = [{key: group[key] for key in SETTINGS} for group in stepping.param_groups]
            own = (self._optimizers.index(stepping), settings)
        everyone = self._communicator.gather_objects(own, "a step in a join context")
        lender = next(i for i, each in enumerate(everyone) if each is not None)
        index, settings = everyone[lender]
        optimizer = self._optimizers[index]
        if stepping is None:
            for group, lent in zip(optimizer.param_groups, settings, strict=True):
                group.update(lent)
        joined = [each is None for each in everyone]
        return optimizer, [
            self._gradient(parameter, lender, joined)
            for parameter in members(optimizer.param_groups)
        ]

    def _gradient(self, parameter: Tensor, lender: int, joined: Sequence[bool]) -> Tensor:
        """The lender's gradient on processes that have joined; empty on the others."""
        numel = parameter.numel()
        part = parameter.new_zeros(numel if self._communicator.me == lender else 0)
        if part.numel() and parameter.grad is not None:
            part = parameter.grad.reshape(-1).to(parameter.dtype)
        have = tuple((0, numel if i == lender else 0) for i in range(len(joined)))
        want = tuple((0, numel if absent else 0) for absent in joined)
        words = "the gradients of a step in a join context"
        received = self._communicator.exchange([Exchange(part, have, want)], lambda: words)[0]
        return received.view(parameter.shape) if received.numel() == numel else received


def _built(
    method: Any,
    context: Any,
    joinables: Iterable[Any],
    enable: bool = True,
    *args: Any,
    **more: Any,
) -> None:
    """Builds a context without the AdaRankGrads among `joinables`: they follow by themselves."""
    alive = [optimizer for built in _BUILT if (optimizer := built()) is not None]
    ours = {id(optimizer) for optimizer in alive}
    given = list(joinables)
    others = [each for each in given if id(getattr(each, "optimizer", each)) not in ours]
    if given and not others:
        raise ConfigError(
            "join: got an AdaRankGrad alone; pass the model that DistributedDataParallel wraps, "
            "too: Join([model, optimizer])"
        )
    method(context, others, enable, *args, **more)
    if not enable:
        return
    models = [each for each in others if isinstance(each, nn.Module)]
    trained = {id(parameter) for model in models for parameter in model.parameters()}
    optimizers = [
        optimizer
        for optimizer in alive
        if not trained.isdisjoint(optimizer.parameter_names())
        and training_group(optimizer.process_group) is not None
    ]
    if not optimizers:
        return
    group = JOIN_GROUP.of(context)
    for optimizer in optimizers:
        if training_group(optimizer.process_group) != group:
            raise ConfigError(
                "join: the model's processes are not the optimizer's; build the optimizer with "
                "process_group=model.process_group"
            )
        if optimizer.defaults["gradient_sync"] == "sketch":
            raise ConfigError(
                'join: got gradient_sync="sketch": a process without batches has no gradient for '
                "the mean; give all processes as many (DistributedSampler pads), or leave "
                'gradient_sync at "engine"'
            )
    _CONTEXTS[context] = JoinedSteps(optimizers, group, JOIN_DEVICE.of(context))


def _counted(method: Any, context: Any) -> float:
    """How many processes begin a forward pass; follows the steps that come before it."""
    steps = _CONTEXTS.get(context)
    while True:
        count: float = method(context)
        if count >= 0 or steps is None:
            return count
        steps.follow()


def _exited(method: Any, context: Any, *exception: Any) -> Any:
    try:
        return method(context, *exception)
    finally:
        steps = _CONTEXTS.pop(context, None)
        if steps is not None:
            steps.close()
