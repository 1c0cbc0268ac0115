"""Which elements of which parameter each process would hold: the engines' rules, on paper.

The adapters in :mod:`arg_dist.engines` find the same in running engines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from arg_dist.config import ConfigError
from arg_dist.planning.choices import ENGINES
from arg_dist.planning.model import Model, Parameter
from arg_dist.planning.rows import Counts
from arg_dist.sharding.layout import Ranges

EngineName = Literal["none", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2"]
REPLICATED = ("none", "ddp", "zero0")
"""Every process holds all parameters; AdaRankGrad shares its work and its state out."""
SUB_GROUP = 10**9
"""Elements of a process after which stage 3 closes a sub-group (`sub_group_size`)."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A parameter over the processes that hold a part of it.

    Attributes:
        parameter: which one.
        owners: the processes, by their indexes in the job.
        ranges: the elements of each owner; all of them for everyone where it is replicated.
    """

    parameter: Parameter
    owners: Counts
    ranges: Ranges


@dataclass(frozen=True)
class Layout:
    """A model under an engine.

    Attributes:
        engine: one of :data:`ENGINES`.
        processes: how many there are.
        calls: the parameters of each call of the optimizer's ``step()``, in their order.
    """

    engine: str
    processes: int
    calls: tuple[tuple[Parameter, ...], ...]

    @property
    def replicated(self) -> bool:
        """Whether every process holds all parameters."""
        return self.engine in REPLICATED

    @property
    def part(self) -> int:
        """Elements of a process's part of the flat tensor, with padding, at stages 1 and 2."""
        total = sum(p.numel for call in self.calls for p in call)
        return -(-total // (2 * self.processes)) * 2

    def pieces(self, call: Sequence[Parameter]) -> Iterator[Piece]:
        """Who holds which elements of the parameters of a call."""
        offset = 0
        for parameter in call:
            if self.engine in ("zero1", "zero2"):
                yield _flat_piece(parameter, offset, self.part)
                offset += parameter.numel
            elif self.replicated:
                everyone = np.arange(self.processes)
                yield Piece(parameter, everyone, ((0, parameter.numel),) * self.processes)
            else:
                chunk = self.chunk(parameter)
                ranges = _chunks(parameter.numel, chunk)
                yield Piece(parameter, np.arange(len(ranges)), ranges)

    def chunk(self, parameter: Parameter) -> int:
        """Elements that each process gets at most where every parameter is cut by itself."""
        if self.engine == "fsdp2":
            rows = parameter.shape[0] if parameter.shape else 1
            return -(-rows // self.processes) * (parameter.numel // rows)
        return -(-parameter.numel // self.processes)


def lay_out(model: Model, engine: str, processes: int) -> Layout:
    """The layout of `model` over `processes` by an engine as its users mostly start it.

    Under DeepSpeed the optimizer is named in the JSON, so that the parameters are one group in the
    model's order; elsewhere they are grouped by :func:`arg_dist.param_groups`.

    Raises:
        ConfigError: an engine that is not known, or several processes without one.
    """
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine}: one of {', '.join(ENGINES)} is needed")
    if engine == "none" and processes != 1:
        raise ConfigError(
            f"--world-size {processes}: --engine none is one process on its own; choose one of "
            f"{', '.join(name for name in ENGINES if name != 'none')}, or leave it out"
        )
    order = model.parameters if engine.startswith("zero") else model.by_group
    layout = Layout(engine, processes, (order,))
    if engine != "zero3":
        return layout
    return Layout(engine, processes, tuple(_sub_groups(layout)))


def _sub_groups(layout: Layout) -> Iterator[tuple[Parameter, ...]]:
    (parameters,) = layout.calls
    group: list[Parameter] = []
    for parameter in parameters:
        group.append(parameter)
        if sum(layout.chunk(each) for each in group) >= SUB_GROUP:
            yield tuple(group)
            group = []
    if group:
        yield tuple(group)


def _flat_piece(parameter: Parameter, offset: int, part: int) -> Piece:
    """The pieces of a parameter that lies at `offset` of a flat tensor, cut into equal parts."""
    end = offset + parameter.numel
    owners = range(offset // part, math.ceil(end / part))
    ranges = tuple(
        (max(i * part, offset) - offset, min((i + 1) * part, end) - offset) for i in owners
    )
    return Piece(parameter, np.array(owners), ranges)


@lru_cache(maxsize=256)
def _chunks(numel: int, chunk: int) -> Ranges:
    return tuple((start, min(start + chunk, numel)) for start in range(0, numel, chunk))
