"""The sharding rules of the engines: which elements of each parameter each process would hold.

The adapters in :mod:`arg_dist.engines` read the same layout from running engines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from arg_dist.config import AdaRankGradConfig, ConfigError
from arg_dist.parameter_groups import check_copies
from arg_dist.planning.choices import ENGINES
from arg_dist.planning.meshes import Mesh, boxes_on, cut_dimensions, held_with_padding
from arg_dist.planning.model import Model, Parameter
from arg_dist.planning.rows import Counts
from arg_dist.sharding.blocks import Boxes
from arg_dist.sharding.layout import Ranges

EngineName = Literal["none", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2"]
REPLICATED = ("none", "ddp", "zero0")
"""Engines that replicate all parameters; AdaRankGrad still shards its work and its state."""
SUB_GROUP = 10**9
"""Elements per process after which ZeRO-3 closes a sub-group (`sub_group_size`)."""


@dataclass(frozen=True, eq=False)
class Piece:
    """The shards of one parameter.

    Attributes:
        parameter: the parameter.
        owners: process indexes of those that hold a shard.
        ranges: element range of each owner; the whole parameter where it is replicated.
        boxes: under tensor parallelism, instead of ranges, what each owner holds of each dimension.
    """

    parameter: Parameter
    owners: Counts
    ranges: Ranges
    boxes: Boxes = ()


@dataclass(frozen=True)
class Layout:
    """The layout of a model under an engine.

    Attributes:
        engine: one of :data:`ENGINES`.
        processes: number of processes.
        calls: parameters of each call to the optimizer's ``step()``, in order.
        copies: copies of the model, each of which is sharded over as many processes, one copy's
            after another's.
        mesh: the processes under tensor parallelism, its replicas included, which are no copies.
        cuts: the dimension of each parameter that tensor parallelism cuts, by name.
    """

    engine: str
    processes: int
    calls: tuple[tuple[Parameter, ...], ...]
    copies: int = 1
    mesh: Mesh | None = None
    cuts: Mapping[str, int | None] = field(default_factory=dict)

    @property
    def of_a_copy(self) -> int:
        """Number of processes over which a copy is sharded."""
        return self.processes // self.copies

    @property
    def one_copy(self) -> Layout:
        """The layout of one of the copies."""
        return replace(self, processes=self.of_a_copy, copies=1)

    @property
    def replicated(self) -> bool:
        """Whether every process holds all parameters."""
        return self.engine in REPLICATED

    def has_terms(self, settings: AdaRankGradConfig) -> bool:
        """Whether each process has gradients of its own, or of micro-batches, that nobody averages.

        Or each copy of the model has.

        Raises:
            ConfigError: they should have, but the engine averages them; or a setting does not work
                with copies.
        """
        if settings.gradient_sync != "sketch":
            return False
        if self.copies > 1:
            check_copies(settings)
            return True
        if self.engine not in ("none", "ddp"):
            sharded = self.engine == "fsdp2" and self.processes > 1
            raise ConfigError(
                f'gradient_sync="sketch": {ENGINES[self.engine]} averages gradients itself; choose '
                f"--engine ddp{', or --copies for several sharded models' if sharded else ''}, or "
                'leave gradient_sync at "engine"'
            )
        return self.processes > 1 or settings.gradient_budget is not None

    @property
    def part(self) -> int:
        """Elements of a process's partition of the flat tensor, with padding (ZeRO-1 and -2)."""
        total = sum(p.numel for call in self.calls for p in call)
        return -(-total // (2 * self.processes)) * 2

    def pieces(self, call: Sequence[Parameter]) -> Iterator[Piece]:
        """The shards of each parameter of a call."""
        offset = 0
        for parameter in call:
            if self.mesh is not None:
                boxes = boxes_on(self.mesh, parameter.shape, self.cuts[parameter.name])
                yield Piece(parameter, np.arange(self.processes), (), boxes)
            elif self.engine in ("zero1", "zero2"):
                yield _flat_piece(parameter, offset, self.part)
                offset += parameter.numel
            elif self.replicated:
                everyone = np.arange(self.processes)
                yield Piece(parameter, everyone, ((0, parameter.numel),) * self.processes)
            else:
                ranges = _chunks(parameter.numel, self.chunk(parameter))
                firsts = self.of_a_copy * np.arange(self.copies)
                owners = (firsts[:, None] + np.arange(len(ranges))).reshape(-1)
                yield Piece(parameter, owners, ranges * self.copies)

    def copy_of(self, owners: Counts) -> tuple[int, ...] | None:
        """In which copy each of some processes holds a part; None if there is one."""
        return tuple((owners // self.of_a_copy).tolist()) if self.copies > 1 else None

    def chunk(self, parameter: Parameter) -> int:
        """Largest number of elements per process where each parameter is sharded on its own."""
        if self.mesh is not None:
            return max(self.in_memory(parameter))
        if self.engine == "fsdp2":
            rows = parameter.shape[0] if parameter.shape else 1
            return -(-rows // self.of_a_copy) * (parameter.numel // rows)
        return -(-parameter.numel // self.processes)

    def in_memory(self, parameter: Parameter) -> list[int]:
        """Elements that each process of a mesh has in memory of a parameter, with padding."""
        assert self.mesh is not None
        return held_with_padding(self.mesh, parameter.shape, self.cuts[parameter.name])


def lay_out(
    model: Model, engine: str, processes: int, copies: int = 1, mesh: Mesh | None = None
) -> Layout:
    """Lay out `model` over `processes` by an engine in its usual setup.

    Under DeepSpeed the optimizer is assumed to be named in the JSON, so the parameters form one
    group in the model's order; elsewhere they are grouped by :func:`arg_dist.param_groups`.

    Args:
        model: the model to train.
        engine: one of :data:`ENGINES`.
        processes: number of processes.
        copies: number of copies of the model, each sharded over its share of the processes.
        mesh: the processes, where tensor parallelism cuts the model beside FSDP2.

    Raises:
        ConfigError: the engine is unknown, or is ``none`` with several processes; or there cannot
            be so many copies; or the model has no tensor-parallel plan.
    """
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine}: unknown; choose from {', '.join(ENGINES)}")
    if engine == "none" and processes != 1:
        raise ConfigError(
            f"--world-size {processes}: --engine none runs a single process; choose one of "
            f"{', '.join(name for name in ENGINES if name != 'none')}, or leave --world-size out"
        )
    if copies > 1:
        _check_shares(engine, processes, copies)
    if mesh is not None and mesh.tp > 1:
        cuts = cut_dimensions(model)
        return Layout(engine, processes, (model.by_group,), mesh=mesh, cuts=cuts)
    order = model.parameters if engine.startswith("zero") else model.by_group
    layout = Layout(engine, processes, (order,), copies)
    if engine != "zero3":
        return layout
    return Layout(engine, processes, tuple(_sub_groups(layout)))


def _check_shares(engine: str, processes: int, copies: int) -> None:
    """Check that an engine can shard each of several copies over its share of the processes."""
    if engine != "fsdp2":
        why = "has one on every process" if engine in ("ddp", "zero0") else "shards a single one"
        raise ConfigError(
            f"--copies {copies}: --engine {engine} {why}; choose --engine fsdp2, or leave --copies "
            "out"
        )
    if processes % copies:
        raise ConfigError(
            f"--copies {copies}: --world-size {processes} cannot be divided by it, and every copy "
            "is sharded over as many processes; change one of them"
        )
    if processes == copies:
        raise ConfigError(
            f"--copies {copies}: leaves each copy a single process of --world-size {processes}, "
            "and nothing to shard; choose --engine ddp, or fewer copies"
        )


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
    """The shards of a parameter at `offset` in a flat tensor partitioned into equal parts."""
    end = offset + parameter.numel
    owners = range(offset // part, math.ceil(end / part))
    ranges = tuple(
        (max(i * part, offset) - offset, min((i + 1) * part, end) - offset) for i in owners
    )
    return Piece(parameter, np.array(owners), ranges)


@lru_cache(maxsize=256)
def _chunks(numel: int, chunk: int) -> Ranges:
    return tuple((start, min(start + chunk, numel)) for start in range(0, numel, chunk))
