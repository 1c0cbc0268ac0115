"""Comparison of what the processes bind: settings, parameters, and the weights of replicas.

The processes exchange digests, and their descriptions only if these differ: with thousands of
processes, descriptions would take most of the time that binding takes.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from arg_dist.sharding.fragment import Fragment
from arg_dist.sharding.layout import GroupSpec, Ranges
from arg_dist.sharding.shard import as_reals
from arg_dist.subspace.distributed import Interval

Parameters = tuple[tuple[str, tuple[int, ...]], ...]
Fingerprint = tuple[float, float]


@dataclass(frozen=True)
class Description:
    """What must be equal on all processes of a parameter group, in full.

    Attributes:
        settings: its settings as text.
        parameters: name and full shape of each parameter.
        weights: a fingerprint of each, if every process holds all of them.
    """

    settings: str
    parameters: Parameters
    weights: tuple[Fingerprint, ...]


class Summary(NamedTuple):
    """What a process tells the others of a parameter group.

    Attributes:
        digest: of the settings and the parameters.
        weights: as of the description.
        ranges: what this process holds of each parameter, an element range or an interval for each
            dimension, two int64 numbers each.
        copy: as of :class:`arg_dist.sharding.fragment.Holding`.
        boxes: a fingerprint of each box that this process holds.
    """

    digest: bytes
    weights: tuple[Fingerprint, ...]
    ranges: bytes
    copy: tuple[int, ...]
    boxes: tuple[Fingerprint, ...] = ()


def describe(spec: GroupSpec) -> Description:
    """Describe a group in full."""
    fragments = spec.holding.fragments
    return Description(
        spec.settings,
        tuple((_named(fragment), tuple(fragment.shape)) for fragment in fragments),
        tuple(map(_fingerprint, fragments)) if spec.holding.replicated else (),
    )


def summarize(spec: GroupSpec, description: Description) -> Summary:
    """What the other processes are told of a group."""
    text = f"{description.settings}\n{description.parameters}"
    held = chain.from_iterable(fragment.held for fragment in spec.holding.fragments)
    return Summary(
        hashlib.sha256(text.encode()).digest(),
        description.weights,
        array("q", chain.from_iterable(held)).tobytes(),
        spec.holding.copy,
        tuple(_fingerprint(each) for each in spec.holding.fragments if each.box is not None),
    )


def _fingerprint(fragment: Fragment) -> Fingerprint:
    """Sum and norm of weights that must be equal on every process."""
    values = as_reals(fragment.view(fragment.target.detach())).double()
    return float(values.sum()), float(values.norm())


def are_alike(everyone: Sequence[Sequence[Summary]]) -> bool:
    """Whether all processes have the same groups, up to rounding of the weights' fingerprints."""
    first = everyone[0]
    digests = [summary.digest for summary in first]
    return all(
        [summary.digest for summary in other] == digests
        and all(
            _alike(a, b)
            for ours, theirs in zip(first, other, strict=True)
            for a, b in zip(ours.weights, theirs.weights, strict=True)
        )
        for other in everyone[1:]
    )


def held_by_all(
    everyone: Sequence[Sequence[Summary]], group: int, fragments: Sequence[Fragment]
) -> list[tuple[Ranges, ...]]:
    """What each process holds of each parameter of a group, as of :attr:`Fragment.held`.

    One entry for each parameter: of each interval, those of all processes.
    """
    held = [summaries[group].ranges for summaries in everyone]
    size, first = 2 * array("q").itemsize, 0
    found = []
    for fragment in fragments:
        intervals = []
        for _ in fragment.held:
            each = b"".join([ranges[first : first + size] for ranges in held])
            intervals.append(_as_ranges(each))
            first += size
        found.append(tuple(intervals))
    return found


def check_holders(
    everyone: Sequence[Sequence[Summary]],
    group: int,
    fragments: Sequence[Fragment],
    held: Sequence[tuple[Ranges, ...]],
) -> None:
    """Check that processes that hold the same box hold the same weights.

    Args:
        everyone: what all processes have told of their groups.
        group: position of the group.
        fragments: its fragments on this process.
        held: what all processes hold, as of :func:`held_by_all`.

    Raises:
        RuntimeError: on every process: they do not.
    """
    boxed = [(f.name, cut) for f, cut in zip(fragments, held, strict=True) if f.box is not None]
    for k, (name, cut) in enumerate(boxed):
        found: dict[tuple[Interval, ...], tuple[int, Fingerprint]] = {}
        for process, box in enumerate(zip(*cut, strict=True)):
            mine = everyone[process][group].boxes[k]
            other, theirs = found.setdefault(box, (process, mine))
            if not _alike(theirs, mine):
                raise RuntimeError(
                    f"{name}: processes {other} and {process} of the group hold the same part of "
                    "it with different weights; set one seed on all processes before the model is "
                    "built, or load it everywhere from one file; if they are to differ, as experts "
                    "of each process, make them one DTensor over these processes"
                )


def _named(fragment: Fragment) -> str:
    return fragment.name if fragment.box is None else f"{fragment.name} (in blocks)"


@lru_cache(maxsize=4096)
def _as_ranges(held: bytes) -> Ranges:
    """Ranges of one parameter; one object for all parameters that are cut alike."""
    numbers = array("q", held)
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def refuse_difference(everyone: Sequence[Sequence[Description]]) -> None:
    """Tell what differs between the processes' groups.

    Raises:
        RuntimeError: the first difference.
    """
    first = everyone[0]
    for process, other in enumerate(everyone[1:], start=1):
        if len(other) != len(first):
            _disagree("number of parameter groups", process, len(first), len(other))
        for k, (ours, theirs) in enumerate(zip(first, other, strict=True)):
            if ours.settings != theirs.settings:
                a, b = first_difference(ours.settings, theirs.settings)
                _disagree(f"settings of parameter group {k}", process, a, b)
            counts = len(ours.parameters), len(theirs.parameters)
            if counts[0] != counts[1]:
                _disagree(f"number of parameters in group {k}", process, *counts)
            for mine, its in zip(ours.parameters, theirs.parameters, strict=True):
                if mine != its:
                    texts = (f"{name} {shape}" for name, shape in (mine, its))
                    _disagree(f"parameters of group {k}", process, *texts)
            _compare_weights(process, ours, theirs)


def _compare_weights(process: int, ours: Description, theirs: Description) -> None:
    for (name, _), a, b in zip(ours.parameters, ours.weights, theirs.weights, strict=False):
        if not _alike(a, b):
            raise RuntimeError(
                f"{name}: the weights of process {process} of the group differ from "
                "process 0's; processes of one group must train one model from equal "
                "weights with averaged gradients (DistributedDataParallel ensures both, "
                "unless weights are changed on some processes later); pass "
                "process_group=None if each trains its own model"
            )


def _alike(ours: Fingerprint, theirs: Fingerprint) -> bool:
    """Whether fingerprints are equal up to reduction order; NaN equals NaN."""
    scale = 1e-6 * (abs(ours[1]) + 1e-30)
    return all(not abs(a - b) > scale for a, b in zip(ours, theirs, strict=True))


def first_difference(ours: str, theirs: str) -> tuple[str, str]:
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
