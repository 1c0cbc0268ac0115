"""Binding: from the engine's layout to a plan that every process of the group agrees on.

A plan is created when ``step()`` first receives a set of tensors: only then are they in their final
place. The processes compare their models and settings; any difference raises an error on all of
them immediately, instead of a hang later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.comparison import (
    are_alike,
    check_holders,
    describe,
    held_by_all,
    refuse_difference,
    summarize,
)
from arg_dist.sharding.fragment import Box, Fragment, Holding
from arg_dist.sharding.layout import (
    GroupSpec,
    MatrixView,
    basis_spans_columns,
)
from arg_dist.sharding.overlap import Load, lanes_of, load_of
from arg_dist.sharding.parts import Boxed, Parts, Ranged
from arg_dist.sharding.shard import MatrixShard, Shard, TensorShard
from arg_dist.sharding.shares import is_sharded
from arg_dist.subspace.distributed import DimensionSharding, MatrixSharding


@dataclass(frozen=True)
class Unit:
    """A matrix or tensor of a plan, whether or not this process holds a part of it.

    Attributes:
        name: its name.
        fragment: the parameter that contains it.
        sharding: how a matrix, or the elements of a tensor, are distributed over the processes.
    """

    name: str
    fragment: Fragment
    sharding: MatrixSharding | DimensionSharding


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that one process group does in one call to ``step()``.

    Attributes:
        communicator: the process group.
        shards: this process's parts, in an order equal on all processes.
        groups: positions of its parameter groups among those of the call.
        units: all matrices and tensors, including those that other processes hold.
        lanes: their positions, divided into lanes (:mod:`arg_dist.sharding.overlap`).
        held: the fragments that this process holds.
        own: of each, by its name, the elements that this process writes to a checkpoint.
        shared: names of those of which several processes hold the same box, with equal gradients;
            equal on all processes.
        replicated: every process holds all parameters; only the state is sharded.
        copies: communicators of the processes that hold the same parts in other copies of the
            model.
        terms: every process, or every copy of a sharded model, has gradients of its own, whose mean
            is that of the model.
        copy_of: in which of these copies each process holds a part; None if there are none.
    """

    communicator: Communicator
    shards: list[Shard]
    groups: list[int]
    units: list[Unit]
    lanes: list[range]
    held: list[Fragment]
    own: dict[str, Box]
    shared: frozenset[str]
    replicated: bool
    copies: list[Communicator]
    terms: bool = False
    copy_of: tuple[int, ...] | None = None

    @cached_property
    def names(self) -> list[str]:
        """Names of all matrices and tensors."""
        return [unit.name for unit in self.units]

    @cached_property
    def is_alone(self) -> bool:
        """Whether this process is the only one that trains these tensors."""
        return self.communicator.size == 1 and not self.copies

    @cached_property
    def keys_only(self) -> list[Unit]:
        """What this process holds nothing of, and of which its state needs the keys all the same.

        PyTorch looks up the keys of a sharded tensor's state on every process.
        """
        return [unit for unit in self.elsewhere if is_sharded(unit.fragment.target)]

    @cached_property
    def elsewhere(self) -> list[Unit]:
        """Matrices and tensors of which this process holds nothing."""
        held = {shard.unit for shard in self.shards}
        return [unit for i, unit in enumerate(self.units) if i not in held]

    @cached_property
    def shards_by_lane(self) -> list[list[Shard]]:
        """This process's shards in each lane, in order."""
        lane_of = [lane for lane, units in enumerate(self.lanes) for _ in units]
        found: list[list[Shard]] = [[] for _ in self.lanes]
        for shard in self.shards:
            found[lane_of[shard.unit]].append(shard)
        return found


def make_plans(
    specs: Sequence[GroupSpec],
    communicators: dict[Any, Communicator],
    time_limit: float,
    bucket_size: int,
    *,
    resting: bool = False,
) -> list[Plan]:
    """Create one plan for each process group among the parameter groups.

    Args:
        specs: the parameter groups of this call to ``step()``.
        communicators: existing communicators by process group; new ones are added.
        time_limit: seconds that a process waits for the others in one collective.
        bucket_size: bytes of fp32 weights in flight at a time.
        resting: the parameters do not train now, and were compared when they did; then, if every
            process holds them whole, the processes do not communicate.

    Raises:
        RuntimeError: on every process, if they disagree or the layout is not supported.
    """
    by_group: dict[Any, list[tuple[int, GroupSpec]]] = {}
    for position, spec in enumerate(specs):
        by_group.setdefault(spec.holding.group, []).append((position, spec))

    def communicator_of(group: Any, holdings: Sequence[Holding]) -> Communicator:
        if group not in communicators:
            communicators[group] = Communicator(group, time_limit, holdings)
        return communicators[group]

    plans = []
    for group, members in by_group.items():
        holdings = [spec.holding for _, spec in members]
        found = dict.fromkeys(copies for holding in holdings for copies in holding.copies)
        copies = [communicator_of(each, holdings) for each in found]
        communicator = communicator_of(group, holdings)
        plans.append(_make_plan(members, communicator, copies, bucket_size, resting))
    return plans


def _make_plan(
    members: list[tuple[int, GroupSpec]],
    communicator: Communicator,
    copies: list[Communicator],
    bucket_size: int,
    resting: bool,
) -> Plan:
    described = [describe(spec) for _, spec in members]
    told = [summarize(spec, each) for (_, spec), each in zip(members, described, strict=True)]
    if resting and all(spec.holding.replicated for _, spec in members):
        everyone = [told] * communicator.size
    else:
        purpose = "comparing layouts at the first step"
        everyone = communicator.gather_objects(told, purpose)
        if not are_alike(everyone):
            refuse_difference(communicator.gather_objects(described, purpose))
    shards: list[Shard] = []
    units: list[Unit] = []
    loads: list[Load] = []
    held: list[Fragment] = []
    own: dict[str, Box] = {}
    shared: set[str] = set()
    copy_of = _copies_of([summaries[0].copy for summaries in everyone])
    for k, (position, spec) in enumerate(members):
        fragments = spec.holding.fragments
        held_by_each = held_by_all(everyone, k, fragments)
        check_holders(everyone, k, fragments, held_by_each)
        for fragment, cut in zip(fragments, held_by_each, strict=True):
            if fragment.box is not None:
                parts: Parts = Boxed(fragment, cut, spec, communicator.me)
            else:
                parts = Ranged(fragment, cut[0], spec, communicator.me, copy_of)
            found, load = _shards_of(fragment, parts, spec, position, communicator.me, units)
            shards += found
            loads += load
            held.append(fragment)
            own[fragment.name] = parts.own
            if parts.is_shared:
                shared.add(fragment.name)
    names = [unit.name for unit in units]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RuntimeError(f"two matrices are named {twice!r}; rename one of the parameters")
    holdings = [spec.holding for _, spec in members]
    return Plan(
        communicator,
        shards,
        [position for position, _ in members],
        units,
        lanes_of(loads, bucket_size),
        held,
        own,
        frozenset(shared),
        replicated=any(holding.replicated for holding in holdings),
        copies=copies,
        terms=any(spec.terms for _, spec in members),
        copy_of=copy_of,
    )


def _copies_of(copies: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """In which copy of the model each process holds a part; None if there is one.

    Args:
        copies: of each process the processes of its copy.
    """
    if not any(copies):
        return None
    found = {copy: i for i, copy in enumerate(dict.fromkeys(copies))}
    return tuple(found[copy] for copy in copies)


def _shards_of(
    fragment: Fragment,
    parts: Parts,
    spec: GroupSpec,
    position: int,
    me: int,
    units: list[Unit],
) -> tuple[list[Shard], list[Load]]:
    """This process's shards of one parameter, and the loads of its matrices or tensor.

    Appends them to `units`, whether or not this process holds a part of them.
    """
    views = spec.views(fragment.name, fragment.parameter_shape)
    if fragment.transposed:
        views = [MatrixView(view.name, view.columns, view.rows, view.offset) for view in views]
    shards: list[Shard] = []
    loads: list[Load] = []
    for home, view in enumerate(views, start=spec.positions[fragment.name]):
        unit = len(units)
        spans_columns = basis_spans_columns(view.rows, view.columns, spec.side, fragment.transposed)
        sharding, offset, held = parts.matrix(view, spans_columns, home)
        units.append(Unit(view.name, fragment, sharding))
        largest = spec.largest_rank(view.short)
        loads.append(load_of(sharding, largest, goes_home=spec.goes_home))
        if held[0] == held[1]:
            continue
        shards.append(
            MatrixShard(
                unit=unit,
                name=view.name,
                fragment=fragment,
                offset=offset,
                range=held,
                group=position,
                me=me,
                matrix=view,
                sharding=sharding,
                spans_columns=spans_columns,
                replicated=spec.holding.replicated,
                phase=phase_of(view.name),
            )
        )
    if not views:
        unit = len(units)
        flat = parts.tensor()
        units.append(Unit(fragment.name, fragment, flat))
        loads.append(load_of(flat))
        if fragment.start < fragment.stop:
            start, width = fragment.start, fragment.width
            shards.append(
                TensorShard(
                    unit=unit,
                    name=fragment.name,
                    fragment=fragment,
                    offset=0,
                    range=(start * width, fragment.stop * width),
                    group=position,
                    me=me,
                    sharding=flat,
                )
            )
    return shards, loads


def phase_of(name: str) -> float:
    """In [0, 1): staggers refreshes over the steps, by name alone, so equal under every engine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
