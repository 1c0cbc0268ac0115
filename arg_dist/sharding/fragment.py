"""What an engine tells the optimizer: which part of which parameter this process holds.

A fragment is a contiguous row-major range of a parameter's elements. Every engine gives a process
one (perhaps empty) range of each parameter, so an engine's adapter has to answer only that, and
everything else is written once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """Elements ``[start, stop)`` of one parameter, and where they live.

    Attributes:
        name: the parameter's name.
        shape: its full shape; of its transpose where `transposed`.
        start: first element held.
        stop: one past the last element held.
        target: the tensor of the optimizer's parameter group that contains them.
        view: from `target`, or its gradient, to the elements held, in row-major order.
        transposed: the engine cuts the second dimension, so rows here are columns there.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    target: Tensor
    view: Callable[[Tensor], Tensor]
    transposed: bool = False

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The parameter's shape as the model has it."""
        return self.shape[::-1] if self.transposed else self.shape


@dataclass(frozen=True)
class Holding:
    """What this process holds of one parameter group.

    Attributes:
        fragments: one per parameter of the group, in an order equal on all processes; parameters
            of which this process holds nothing have an empty fragment.
        group: the processes over which the parameters are spread; None for one process.
        replicated: every process holds all of every parameter and the same gradient; the work and
            the state are shared out.
        saved_by_key: checkpoints merge what all processes give them, by key, so that each process
            has to save its state under a key of its own.
        saved_by_first: whether checkpoints are now those of the first process alone, for which it
            needs everyone's keys; asked on all processes whenever they save.
    """

    fragments: list[Fragment]
    group: dist.ProcessGroup | None
    replicated: bool = False
    saved_by_key: bool = False
    saved_by_first: Callable[[], bool] = bool


@dataclass(frozen=True)
class ParameterGroup:
    """One parameter group as an adapter sees it.

    Attributes:
        targets: the tensors in the group now; engines replace the original ones.
        names: names of the parameters that were put into the group at the beginning.
        parameters: those parameters, as far as they are still alive.
        process_group: processes that train the same model together, where the tensors do not tell.
    """

    targets: list[Tensor]
    names: Sequence[str]
    parameters: list[Tensor | None]
    process_group: dist.ProcessGroup | None

    def alive(self) -> list[tuple[str, Any]]:
        """Name and parameter of those that are still alive."""
        return [
            (name, parameter)
            for name, parameter in zip(self.names, self.parameters, strict=True)
            if parameter is not None
        ]


StepCall = list[tuple[int, list[Tensor]]]
"""One call of ``step()``: positions of parameter groups, and the tensors that they then hold."""


class Adapter(ABC):
    """Knows the layout of one engine; lives in ``arg_dist.engines``."""

    @abstractmethod
    def recognizes(self, group: ParameterGroup) -> bool:
        """Whether the group's parameters are under this engine."""

    @abstractmethod
    def hold(self, group: ParameterGroup) -> Holding:
        """What this process holds of the group.

        Raises:
            RuntimeError: if the engine's layout is not what this adapter knows.
        """

    def on_construction(self, optimizer: Any) -> None:  # noqa: B027  nothing to do, mostly
        """Called when an optimizer is built, before an engine takes it over."""

    def step_calls(self, groups: Sequence[ParameterGroup]) -> list[StepCall] | None:
        """The coming calls of ``step()``; None where one call has all tensors, or not mine."""
        return None

    def untrained(self, name: str, parameter: Tensor) -> Holding | None:
        """What this process holds of one parameter that no optimizer trains; None: not cut by me.

        The `target` of its one fragment is where the values lie.
        """
        return None

    def weights_loaded(self, optimizer: Any) -> None:  # noqa: B027
        """Called on every process after a checkpoint's weights were put into the targets."""


ADAPTERS: list[Adapter] = []
"""Adapters in the order in which they are asked; the engines register themselves at import."""


def step_calls(groups: Sequence[ParameterGroup]) -> list[StepCall]:
    """How ``step()`` is going to be called; engines may show it one group, or a part, at a time."""
    for adapter in ADAPTERS:
        calls = adapter.step_calls(groups)
        if calls is not None:
            return calls
    return [[(i, group.targets) for i, group in enumerate(groups)]]


def hold(group: ParameterGroup) -> Holding:
    """What this process holds of `group`, by the first adapter that recognizes it.

    Raises:
        RuntimeError: if no engine's adapter does.
    """
    for adapter in ADAPTERS:
        if adapter.recognizes(group):
            return adapter.hold(group)
    kinds = sorted({type(target).__name__ for target in group.targets})
    raise RuntimeError(
        f"the parameter group holds {', '.join(kinds)} of shapes "
        f"{[tuple(target.shape) for target in group.targets[:3]]}, a layout that no engine of "
        "arg_dist knows; see the README's table of what is supported"
    )
