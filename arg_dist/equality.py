"""What must be equal on all processes, compared in each step before it changes anything.

That is the settings of the parameter groups; where every process holds the whole model, its weights
and averaged gradients; and of sharded models what several processes hold.
The agreement carries a summary; if it differs, one more exchange finds out what differs and where.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from arg_dist.algorithm import is_due
from arg_dist.config import AdaRankGradConfig
from arg_dist.parameter_groups import settings_text
from arg_dist.sharding.comparison import first_difference
from arg_dist.sharding.drivers import run
from arg_dist.sharding.plan import Plan
from arg_dist.sharding.shard import MatrixShard, Shard
from arg_dist.sharding.stragglers import enumerated
from arg_dist.sharding.timeouts import named
from arg_dist.step import Agreement, Likeness
from arg_dist.subspace.distributed import Interval, Steps
from arg_dist.subspace.fingerprint import Numbers, differ, fingerprint, summary
from arg_dist.subspace.state import State

AT_LEAST_ELEMENTS, AT_MOST_TENSORS = 2**20, 16
"""Compared in each step by turns, in addition to the matrices that refresh."""
COPIES_EVERY = 20
"""Steps between comparisons of what several processes hold, or of gradients that must differ."""


T = TypeVar("T")


class Seen(NamedTuple):
    """What a process compares of one matrix or tensor.

    Attributes:
        name: its name.
        has_gradient: whether its gradient is set; a missing one counts as zero.
        gradient: fingerprint of the gradient.
        weights: fingerprint of the weights.
    """

    name: str
    has_gradient: bool
    gradient: Numbers
    weights: Numbers


@dataclass(frozen=True)
class Comparison:
    """What this process compares in one step.

    Attributes:
        plan: the plan of the step.
        step: steps taken before.
        settings: settings of the plan's parameter groups, as text.
        due: names of the matrices that refresh; of those that every process holds whole.
        shards: matrices and tensors that every process holds whole, and that are compared now.
        fingerprints: ``shards x 2 x 2``, of their gradients and weights; None without `shards`.
        apart: differences from other processes that hold the same parts, in words.
    """

    plan: Plan
    step: int
    settings: list[str]
    due: list[str] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    fingerprints: Tensor | None = None
    apart: list[str] = field(default_factory=list)

    @property
    def likeness(self) -> Likeness:
        """What the agreement carries."""
        checksum = zlib.crc32("\n".join([*self.settings, *self.due]).encode()) >> 1
        if self.fingerprints is None:
            return Likeness(checksum, None, bool(self.apart))
        units = [shard.unit for shard in self.shards]
        return Likeness(checksum, summary(self.fingerprints, units), bool(self.apart))

    def agreement(self, steps: Steps[Agreement]) -> Agreement:
        """Reach the agreement that carries :attr:`likeness`.

        Raises:
            RuntimeError: on every process, if settings, gradients or weights differ.
        """
        plan = self.plan
        purpose, names = "the sum of norms", [named(plan.names)]
        agreed = run([steps], plan.communicator, 1, purpose, names)[0]
        self._check(agreed)
        return agreed

    def _check(self, agreed: Agreement) -> None:
        """Find out what differs, if anything does."""
        if not agreed.unlike or agreed.strangers or agreed.nonfinite():
            return
        seen = _seen(self.shards, self.fingerprints)
        everyone = self.plan.communicator.gather_objects(
            (self.settings, self.due, seen, self.apart), "comparing the processes"
        )
        settings, due, tensors, apart = zip(*everyone, strict=True)
        _check_settings(settings, self.plan.groups, self.step)
        _check_tensors([{each.name: each for each in seen} for seen in tensors], self.step)
        _check_due(due)
        for difference in chain.from_iterable(apart):
            raise RuntimeError(difference)


def compare(
    plan: Plan,
    states: Mapping[int, State],
    settings: Sequence[AdaRankGradConfig],
    step: int,
) -> Comparison:
    """Take the fingerprints that are due; collective if several processes hold the same parts.

    Args:
        plan: the plan of the step.
        states: this process's part of the state of each matrix and tensor, by unit.
        settings: settings of the parameter groups of this call.
        step: steps taken before; equal on all processes.
    """
    texts = [settings_text(settings[group]) for group in plan.groups]
    if plan.terms and plan.communicator.size > 1 and step % COPIES_EVERY == 0:
        _check_own_gradients(plan)
    if (plan.copies or plan.copy_of or plan.shared) and step % COPIES_EVERY == 0:
        return Comparison(plan, step, texts, apart=_apart_from_others(plan, step))
    if not plan.replicated or not plan.shards:
        return Comparison(plan, step, texts)
    due = [
        shard
        for shard in plan.shards
        if isinstance(shard, MatrixShard) and is_due(states[shard.unit])
    ]
    new = [shard for shard in plan.shards if not states[shard.unit]]
    shards = _chosen([*due, *new], plan.shards, step)
    names = [shard.name for shard in due]
    return Comparison(plan, step, texts, names, shards, _fingerprints(shards))


def _check_own_gradients(plan: Plan) -> None:
    """Check that processes that hold the same have gradients of their own; collective.

    Raises:
        RuntimeError: on every process: they have their average.
    """
    gradients = [gradient for shard in plan.shards if (gradient := shard.gradient()) is not None]
    seen = [fingerprint(gradient).tolist() for gradient in gradients]
    everyone = plan.communicator.gather_objects((_parts(plan), seen), "comparing gradients")
    has_some = any(any(numbers) for _, found in everyone for numbers in found)
    if has_some and all(seen == everyone[i][1] for i, (_, seen) in _with_first(everyone)):
        raise RuntimeError(
            f'gradient_sync: got "sketch", but the gradients of all {len(everyone)} processes are '
            "equal: DistributedDataParallel averages them (call arg_dist.sketch_only(model) after "
            "wrapping the model in it), the job does, or all processes read the same batches (use "
            "a DistributedSampler). This step changed nothing"
        )


def _parts(plan: Plan) -> list[tuple[str, Interval]]:
    """What this process holds."""
    return [(shard.name, shard.range) for shard in plan.shards]


def _with_first(everyone: Sequence[tuple[Any, T]]) -> Iterator[tuple[int, tuple[Any, T]]]:
    """What each process sent, and the first that holds the same parts."""
    parts = [held for held, _ in everyone]
    return ((parts.index(each[0]), each) for each in everyone)


def _chosen(certain: Sequence[Shard], shards: Sequence[Shard], step: int) -> list[Shard]:
    """The `certain` ones, and a few others by turns."""
    chosen = {shard.unit: shard for shard in certain}
    elements, first = 0, step % len(shards)
    for shard in islice(chain(shards[first:], shards[:first]), AT_MOST_TENSORS):
        chosen[shard.unit] = shard
        elements += shard.range[1] - shard.range[0]
        if elements >= AT_LEAST_ELEMENTS:
            break
    return [chosen[unit] for unit in sorted(chosen)]


def _fingerprints(shards: Iterable[Shard]) -> Tensor:
    """``shards x 2 x 2``, fp64: of gradients and weights, on the device of the first."""
    found = []
    for shard in shards:
        weights = fingerprint(shard.values())
        gradient = shard.gradient() if shard.terms == 1 else None
        both = torch.zeros_like(weights) if gradient is None else fingerprint(gradient)
        found.append(torch.stack([both, weights]))
    return torch.stack([each.to(found[0].device) for each in found])


def _seen(shards: Sequence[Shard], fingerprints: Tensor | None) -> list[Seen]:
    numbers = [] if fingerprints is None else fingerprints.tolist()
    return [
        Seen(shard.name, shard.gradient() is not None, *each)
        for shard, each in zip(shards, numbers, strict=True)
    ]


def _apart_from_others(plan: Plan, step: int) -> list[str]:
    """What differs from other processes that hold the same parts, in words."""
    shards = [each for each in plan.shards if not plan.shared or each.fragment.name in plan.shared]
    seen = _seen(shards, _fingerprints(shards) if shards else None)
    parts = [(shard.name, shard.fragment.held, shard.range) for shard in shards]
    found = []
    for holders in plan.copies or [plan.communicator]:
        sent = list(zip(parts, seen, strict=True))
        first: dict[Any, tuple[int, Seen]] = {}
        for place, theirs in enumerate(holders.gather_objects(sent, "comparing equal parts")):
            for part, its in theirs:
                holder, known = first.setdefault(part, (place, its))
                if what := _difference(known, its):
                    pair = holders.processes[holder], holders.processes[place]
                    found.append(_holders_differ(its.name, what, pair, step))
    return found


def _difference(ours: Seen, theirs: Seen) -> str:
    if differ(ours.gradient, theirs.gradient):
        return "gradient"
    return "weights" if differ(ours.weights, theirs.weights) else ""


def _holders_differ(name: str, what: str, pair: tuple[int, int], step: int) -> str:
    return (
        f"{name}: processes {pair[0]} and {pair[1]} of the job hold the same part of it, and its "
        f"{what} differs between them at step {step}; gradients must be averaged over the copies "
        "of a model, and be equal on the processes of tensor parallelism; change weights on all of "
        "them alike. This step changed nothing: resume from the last checkpoint"
    )


def _check_settings(everyone: Sequence[Sequence[str]], groups: Sequence[int], step: int) -> None:
    for process, theirs in enumerate(everyone):
        for group, a, b in zip(groups, everyone[0], theirs, strict=True):
            if a != b:
                first, other = first_difference(a, b)
                raise RuntimeError(
                    f"the settings of parameter group {group} differ at step {step}: process 0 of "
                    f"the group has {first}, process {process} has {other}; change them alike on "
                    "every process (a scheduler that follows the loss needs its average over the "
                    "processes). This step changed nothing"
                )


def _check_tensors(everyone: Sequence[dict[str, Seen]], step: int) -> None:
    """Raises if a tensor that every process holds whole is not equal on all of them."""
    first = everyone[0]
    for what in ("gradient", "weights"):
        apart: dict[str, list[int]] = {}
        for process, theirs in enumerate(everyone):
            for name in first.keys() & theirs.keys():
                if differ(getattr(first[name], what), getattr(theirs[name], what)):
                    apart.setdefault(name, []).append(process)
        if apart:
            name = next(name for name in first if name in apart)
            raise RuntimeError(_TELLS[what](name, apart, everyone, step))


def _check_due(everyone: Sequence[Sequence[str]]) -> None:
    for process, theirs in enumerate(everyone):
        for name in sorted({*everyone[0]} ^ {*theirs}):
            raise RuntimeError(
                f"{name}: is due for a new basis on one of processes 0 and {process} of the group "
                "only, so their optimizer states differ; load the same checkpoint on every process"
            )


def _gradients_differ(
    name: str, apart: dict[str, list[int]], everyone: Sequence[dict[str, Seen]], step: int
) -> str:
    without = [str(i) for i, seen in enumerate(everyone) if not seen[name].has_gradient]
    none = f" (process {enumerated(without)} has none)" if without else ""
    return (
        f"{name}: the gradient of process {_processes(apart[name])} of the group differs from "
        f"process 0's at step {step}{none}{_others(apart, everyone[0])}. Processes that share the "
        "optimizer's work need equal, averaged gradients. If each process steps on its own "
        "gradient for a while (no_sync, local SGD, post_localSGD, DiLoCo), pass "
        "process_group=None; otherwise wrap the model in DistributedDataParallel, run forward and "
        "backward through the wrapper, and change gradients alike on every process. This step "
        "changed nothing"
    )


def _weights_differ(
    name: str, apart: dict[str, list[int]], everyone: Sequence[dict[str, Seen]], step: int
) -> str:
    return (
        f"{name}: the weights of process {_processes(apart[name])} of the group differ from "
        f"process 0's at step {step}{_others(apart, everyone[0])}. Something has changed them on "
        "some processes only (loading, averaging, clipping); change them on every process, or "
        "pass process_group=None if each trains its own model. This step changed nothing: resume "
        "from the last checkpoint"
    )


_TELLS = {"gradient": _gradients_differ, "weights": _weights_differ}


def _processes(indexes: Sequence[int]) -> str:
    return enumerated([str(index) for index in indexes])


def _others(apart: dict[str, list[int]], compared: dict[str, Seen]) -> str:
    count = len(apart) - 1
    return f", as do those of {count} of {len(compared) - 1} others compared" if count else ""
