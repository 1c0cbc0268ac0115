"""The interface to engines: which part of which parameter this process holds.

A fragment is a contiguous row-major range of a parameter's elements or, on meshes that cut several
dimensions, a box of them. Under every engine, a process holds one (possibly empty) of each
parameter, so an engine's adapter reports only that and all other code is shared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch.distributed as dist
from torch import Tensor

from arg_dist.subspace.distributed import Interval

Box = tuple[Interval, ...]
"""An interval in each dimension of a tensor; or one, of its elements in row-major order."""


@dataclass(frozen=True)
class Fragment:
    """Elements ``[start, stop)`` of one parameter, and the tensor that contains them.

    Attributes:
        name: the parameter's name.
        shape: its full shape; that of its transpose if `transposed`.
        start: first element held.
        stop: one past the last element held.
        target: the tensor of the optimizer's parameter group that contains them.
        view: maps `target`, or its gradient, to the elements held, in row-major order.
        transposed: the engine shards the second dimension, so rows here are the parameter's
            columns.
        box: what is held in each dimension, where an engine may cut several; None for a range. Then
            `start` is 0 and `stop` the number of elements held.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    target: Tensor
    view: Callable[[Tensor], Tensor]
    transposed: bool = False
    box: Box | None = None

    @property
    def held(self) -> Box:
        """The range of elements held, or the box."""
        return ((self.start, self.stop),) if self.box is None else self.box

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The parameter's shape in the model."""
        return self.shape[::-1] if self.transposed else self.shape

    @cached_property
    def width(self) -> int:
        """Real numbers in one element: 2 if the parameter is complex."""
        return 2 if self.target.is_complex() else 1


@dataclass(frozen=True)
class Holding:
    """What this process holds of one parameter group.

    Attributes:
        fragments: one per parameter of the group, in an order equal on all processes; empty for
            parameters of which this process holds nothing.
        group: the processes over which the parameters are sharded; None for a single process.
        replicated: every process holds all parameters whole, with equal gradients; work and state
            are sharded.
        copies: groups of processes that hold the same parts in different copies of the model, with
            equal gradients.
        processes: indexes in the job of those that hold parts, where `group` does not have them.
        copy: if the copies have gradients of their own, `group` has the processes of all, and this
            are those of the copy of which this process holds a part; else empty.
    """

    fragments: list[Fragment]
    group: dist.ProcessGroup | None
    replicated: bool = False
    copies: tuple[dist.ProcessGroup, ...] = ()
    copy: tuple[int, ...] = ()
    processes: tuple[int, ...] = ()

    def in_copies(self, everyone: dist.ProcessGroup) -> Holding | None:
        """The same among the processes of all copies of the model; None if this is the only one."""
        here: tuple[int, ...] = (dist.get_rank(),)
        if self.group is not None:
            here = tuple(dist.get_process_group_ranks(self.group))
        if not set(here) < set(dist.get_process_group_ranks(everyone)):
            return None
        return replace(self, group=everyone, copy=here)


@dataclass(frozen=True)
class ParameterGroup:
    """One parameter group as an adapter receives it.

    Attributes:
        targets: the tensors in the group now; engines replace the original ones.
        names: names of the parameters originally in the group.
        parameters: those parameters, or what an engine or the user has put in their places; None
            for each whose place no longer exists.
        process_group: processes that train the same model together, for tensors that do not carry
            this information.
        resting: the parameters are frozen but have state, and are held as if they trained.
        together: the tensors in all parameter groups of the optimizer.
    """

    targets: list[Tensor]
    names: Sequence[str]
    parameters: list[Tensor | None]
    process_group: dist.ProcessGroup | None
    resting: bool = False
    together: Sequence[Tensor] = ()

    def holds(self, target: Tensor) -> bool:
        """Whether a target is to be held: it trains, or rests with state."""
        return self.resting or target.requires_grad

    def alive(self) -> list[tuple[str, Any]]:
        """Names and parameters of those that exist."""
        return [
            (name, parameter)
            for name, parameter in zip(self.names, self.parameters, strict=True)
            if parameter is not None
        ]


StepCall = list[tuple[int, list[Tensor]]]
"""One call to ``step()``: positions of parameter groups, and the tensors they hold in it."""


class Adapter(ABC):
    """Describes the layout of one engine; implementations are in ``arg_dist.engines``."""

    @abstractmethod
    def recognizes(self, group: ParameterGroup) -> bool:
        """Whether this engine manages the group's parameters."""

    @abstractmethod
    def hold(self, group: ParameterGroup) -> Holding:
        """What this process holds of the group.

        Raises:
            RuntimeError: the engine's layout is not supported by this adapter.
        """

    def on_construction(self, optimizer: Any) -> None:  # noqa: B027  optional hook
        """Called when an optimizer is built, before an engine takes it over."""

    def on_first_step(self, optimizer: Any) -> None:  # noqa: B027
        """Called before the first step of an optimizer, or of its copy."""

    def step_calls(self, groups: Sequence[ParameterGroup]) -> list[StepCall] | None:
        """The upcoming calls to ``step()``; None: one call with all tensors, or another engine."""
        return None

    def untrained(self, name: str, parameter: Tensor) -> Holding | None:
        """What this process holds of a parameter that no optimizer trains.

        None if this engine does not shard it. The `target` of its one fragment holds the values.
        """
        return None

    def weights_loaded(self, optimizer: Any) -> None:  # noqa: B027
        """Called on every process after a checkpoint's weights were loaded into the targets."""


_adapters: tuple[Adapter, ...] = ()


def use_adapters(adapters: tuple[Adapter, ...]) -> None:
    """Set the engines' adapters, in the order in which they are tried.

    The package does so once, when it is imported: nothing here may import an engine.
    """
    global _adapters
    _adapters = adapters


def adapters() -> tuple[Adapter, ...]:
    """The engines' adapters, in the order in which they are tried."""
    return _adapters


def step_calls(groups: Sequence[ParameterGroup]) -> list[StepCall]:
    """The upcoming calls to ``step()``; engines may pass one group, or a part of it, at a time."""
    for adapter in _adapters:
        calls = adapter.step_calls(groups)
        if calls is not None:
            return calls
    return [[(i, group.targets) for i, group in enumerate(groups)]]


def hold(group: ParameterGroup) -> Holding:
    """What this process holds of `group`, from the first adapter that recognizes it.

    Raises:
        RuntimeError: no adapter recognizes it.
    """
    for adapter in _adapters:
        if adapter.recognizes(group):
            return adapter.hold(group)
    kinds = sorted({type(target).__name__ for target in group.targets})
    shapes = [tuple(target.shape) for target in group.targets[:3]]
    raise RuntimeError(
        f"{', '.join(group.names[:3])}: the parameter group was built with {len(group.names)} "
        f"parameters and now holds {len(group.targets)} of the type {', '.join(kinds)} (shapes "
        f"{shapes}), a layout that arg_dist does not know: they were replaced or removed by the "
        "job, or by an engine that is not in the README's table"
    )
