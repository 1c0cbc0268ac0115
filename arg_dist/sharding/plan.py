"""Binding: from the engine's layout to a plan that every process of the group agrees on.

A plan is created when ``step()`` first receives a set of tensors: only then are they in their final
place. The processes compare their models and settings; any difference raises an error on all of
them immediately, instead of a hang later.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.fragment import Fragment, Holding
from arg_dist.sharding.lanes import lanes_of
from arg_dist.sharding.layout import (
    MatrixView,
    Ranges,
    basis_spans_columns,
    check_tiling,
    clip_ranges,
    element_side,
    matrix_spread,
)
from arg_dist.sharding.local import as_reals
from arg_dist.sharding.shard import MatrixShard, Shard, TensorShard

FP32_BYTES = 4


@dataclass(frozen=True)
class GroupSpec:
    """Specification of one parameter group.

    Attributes:
        holding: what this process holds of it.
        side: `auto`, `left` or `right`.
        shard_basis: store each basis once over the processes; None: if there are several.
        views: maps a parameter's name and full shape to the matrices that AdaRankGrad trains;
            empty for a tensor trained by Adam.
        settings: the group's settings as text; must be equal on all processes.
    """

    holding: Holding
    side: str
    shard_basis: bool | None
    views: Callable[[str, tuple[int, ...]], list[MatrixView]]
    settings: str


@dataclass(frozen=True)
class Plan:
    """Everything that one process group does in one call to ``step()``.

    Attributes:
        communicator: the process group.
        shards: this process's parts, in an order equal on all processes.
        names: names of all matrices and tensors, including those that other processes hold.
        lanes: their positions, divided into lanes (:mod:`arg_dist.sharding.lanes`).
        held: the fragments that this process holds.
        replicated: every process holds all parameters; only the state is sharded.
        saved_by_key: see :class:`arg_dist.sharding.fragment.Holding`.
        saved_by_first: see :class:`arg_dist.sharding.fragment.Holding`.
    """

    communicator: Communicator
    shards: list[Shard]
    names: list[str]
    lanes: list[range]
    held: list[Fragment]
    replicated: bool
    saved_by_key: bool
    saved_by_first: Callable[[], bool]

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
) -> list[Plan]:
    """Create one plan for each process group among the parameter groups.

    Args:
        specs: the parameter groups of this call to ``step()``.
        communicators: existing communicators by process group; new ones are added.
        time_limit: seconds that a process waits for the others in one collective.
        bucket_size: bytes of fp32 weights in flight at a time.

    Raises:
        RuntimeError: on every process, if they disagree or the layout is not supported.
    """
    by_group: dict[Any, list[tuple[int, GroupSpec]]] = {}
    for position, spec in enumerate(specs):
        by_group.setdefault(spec.holding.group, []).append((position, spec))
    plans = []
    for group, members in by_group.items():
        communicator = communicators.get(group) or Communicator(group, time_limit)
        communicators[group] = communicator
        plans.append(_make_plan(members, communicator, bucket_size))
    return plans


def _make_plan(
    members: list[tuple[int, GroupSpec]], communicator: Communicator, bucket_size: int
) -> Plan:
    described = [_describe(spec) for _, spec in members]
    everyone = communicator.gather_objects(described, "comparing layouts at the first step")
    _check_agreement(everyone)
    shards: list[Shard] = []
    names: list[str] = []
    sizes: list[int] = []
    held: list[Fragment] = []
    for k, (position, spec) in enumerate(members):
        for j, fragment in enumerate(spec.holding.fragments):
            ranges = tuple(other[k]["fragments"][j]["range"] for other in everyone)
            if not spec.holding.replicated:
                check_tiling(fragment.name, ranges, math.prod(fragment.shape))
            found, elements = _shards_of(fragment, ranges, spec, position, communicator.me, names)
            shards += found
            sizes += [FP32_BYTES * count for count in elements]
            held.append(fragment)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RuntimeError(f"two matrices are named {twice!r}; rename one of the parameters")
    holdings = [spec.holding for _, spec in members]
    return Plan(
        communicator,
        shards,
        names,
        lanes_of(sizes, bucket_size),
        held,
        replicated=any(holding.replicated for holding in holdings),
        saved_by_key=any(holding.saved_by_key for holding in holdings),
        saved_by_first=holdings[0].saved_by_first,
    )


def _shards_of(
    fragment: Fragment,
    ranges: Ranges,
    spec: GroupSpec,
    position: int,
    me: int,
    names: list[str],
) -> tuple[list[Shard], list[int]]:
    """This process's shards of one parameter, and the element counts of its matrices or tensor.

    Appends their names to `names`.
    """
    replicated, width = spec.holding.replicated, fragment.width
    numel = math.prod(fragment.shape) * width
    views = spec.views(fragment.name, fragment.parameter_shape)
    if fragment.transposed:
        views = [MatrixView(view.name, view.columns, view.rows, view.offset) for view in views]
    shards: list[Shard] = []
    for view in views:
        unit = len(names)
        names.append(view.name)
        mine = clip_ranges(ranges, view.offset, view.rows * view.columns)
        if mine[me][0] == mine[me][1]:
            continue
        spans_columns = basis_spans_columns(view.rows, view.columns, spec.side, fragment.transposed)
        spread = matrix_spread(
            view.rows,
            view.columns,
            mine,
            me=me,
            spans_columns=spans_columns,
            home=unit,
            shard_basis=spec.shard_basis is not False,
            replicated=replicated,
        )
        shards.append(
            MatrixShard(
                unit=unit,
                name=view.name,
                fragment=fragment,
                offset=view.offset,
                range=mine[me],
                group=position,
                me=me,
                matrix=view,
                spread=spread,
                spans_columns=spans_columns,
                replicated=replicated,
                phase=phase_of(view.name),
            )
        )
    if not views:
        unit = len(names)
        names.append(fragment.name)
        ranges = tuple((start * width, stop * width) for start, stop in ranges)
        if fragment.start < fragment.stop:
            shards.append(
                TensorShard(
                    unit=unit,
                    name=fragment.name,
                    fragment=fragment,
                    offset=0,
                    range=ranges[me],
                    group=position,
                    me=me,
                    side=element_side(ranges, numel, replicated),
                )
            )
    return shards, [view.rows * view.columns for view in views] or [numel]


def phase_of(name: str) -> float:
    """In [0, 1): staggers refreshes over the steps, by name alone, so equal under every engine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def _describe(spec: GroupSpec) -> dict[str, Any]:
    return {
        "settings": spec.settings,
        "fragments": [
            {
                "name": fragment.name,
                "shape": tuple(fragment.shape),
                "range": (fragment.start, fragment.stop),
                "weights": _fingerprint(fragment) if spec.holding.replicated else None,
            }
            for fragment in spec.holding.fragments
        ],
    }


def _fingerprint(fragment: Fragment) -> tuple[float, float]:
    """Sum and norm of weights that must be equal on every process."""
    values = as_reals(fragment.view(fragment.target.detach())).double()
    return float(values.sum()), float(values.norm())


def _check_agreement(everyone: list[list[dict[str, Any]]]) -> None:
    first = everyone[0]
    for process, other in enumerate(everyone[1:], start=1):
        if len(other) != len(first):
            _disagree("number of parameter groups", process, len(first), len(other))
        for k, (ours, theirs) in enumerate(zip(first, other, strict=True)):
            if ours["settings"] != theirs["settings"]:
                a, b = _first_difference(ours["settings"], theirs["settings"])
                _disagree(f"settings of parameter group {k}", process, a, b)
            if len(ours["fragments"]) != len(theirs["fragments"]):
                _disagree(
                    f"number of parameters in group {k}",
                    process,
                    len(ours["fragments"]),
                    len(theirs["fragments"]),
                )
            for a, b in zip(ours["fragments"], theirs["fragments"], strict=True):
                if (a["name"], a["shape"]) != (b["name"], b["shape"]):
                    _disagree(
                        f"parameters of group {k}",
                        process,
                        f"{a['name']} {a['shape']}",
                        f"{b['name']} {b['shape']}",
                    )
                if a["weights"] is not None and not _alike(a["weights"], b["weights"]):
                    raise RuntimeError(
                        f"{a['name']}: the weights of process {process} of the group differ from "
                        "process 0's; processes of one group must train one model from equal "
                        "weights with averaged gradients (DistributedDataParallel ensures both, "
                        "unless weights are changed on some processes later); pass "
                        "process_group=None if each trains its own model"
                    )


def _alike(ours: tuple[float, float], theirs: tuple[float, float]) -> bool:
    """Whether fingerprints are equal up to reduction order; NaN equals NaN."""
    scale = 1e-6 * (abs(ours[1]) + 1e-30)
    return all(not abs(a - b) > scale for a, b in zip(ours, theirs, strict=True))


def _first_difference(ours: str, theirs: str) -> tuple[str, str]:
    """The first items in which two lists of settings differ."""
    for a, b in zip(ours.split("; "), theirs.split("; "), strict=False):
        if a != b:
            return a, b
    return ours, theirs


def _disagree(what: str, process: int, ours: object, theirs: object) -> None:
    raise RuntimeError(
        f"the processes of one group have different {what}: process 0 of the group has {ours}, "
        f"process {process} has {theirs}; build the same model and optimizer on all of them, with "
        "the same settings and the same parameters frozen; pass process_group=None if each trains "
        "its own model"
    )
