"""One step on the tensors of a plan: read gradients, agree, run the algorithm, update weights.

Every process first learns the norms of all gradients, and whether they are finite, in one exchange
of a few numbers; then nothing can fail that would leave some processes changed and others not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from arg_dist.algorithm import (
    LowRankUpdate,
    StepFacts,
    adam_step,
    at_hand,
    is_due,
    kept_before,
    low_rank_step,
)
from arg_dist.config import AdaRankGradConfig
from arg_dist.recording import rounds_of_matrix
from arg_dist.sharding.drivers import run_local, run_together
from arg_dist.sharding.overlap import Lane, run_lanes
from arg_dist.sharding.plan import Plan
from arg_dist.sharding.shard import MatrixShard, Shard, TensorShard
from arg_dist.subspace.distributed import Exchange, Steps, even_rows
from arg_dist.subspace.fingerprint import TOLERANCE
from arg_dist.subspace.norm_sketch import BUCKETS, norm_sketch
from arg_dist.subspace.norms import in_host_memory, norm_sq
from arg_dist.subspace.products import (
    MatmulPrecision,
    apply,
    available,
    lowered_precision,
    squares,
)
from arg_dist.subspace.range_finder import Part
from arg_dist.subspace.state import State
from arg_dist.terms import Projected, Term, step_of_terms

# -- gradients ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientPart:
    """This process's part of one gradient, with the norms that the processes exchange.

    Attributes:
        read: returns it, oriented as ``moment x basis`` (if it is not of a matrix, in the type of
            the moments); copies only if necessary. A term of a mean is divided by their number.
        norm_sq: ``||G||^2`` of the part, an fp64 scalar; of K terms ``||G_i||^2 / K``, as the sum
            of these is a limit for ``||G||^2``.
        row_sq: ``moment.touch``, ``||G_i||^2`` of the part; None if it is not of a matrix, or
            projected.
        term: its projection, if the backward pass has made it; then there is nothing to read.
    """

    read: Part
    norm_sq: Tensor
    row_sq: Tensor | None = None
    term: Term | None = None


def gradient_parts(shards: Iterable[Shard]) -> dict[int, GradientPart]:
    """The gradients of shards, by unit; a missing one counts as zero under every engine."""
    parts: dict[int, GradientPart] = {}
    alike: dict[Any, list[tuple[MatrixShard, Tensor]]] = {}
    for shard in shards:
        held = _held_gradient(shard)
        if not isinstance(shard, MatrixShard):
            assert isinstance(shard, TensorShard)
            total = norm_sq(shard.touched_gradient(held)) / shard.terms
            parts[shard.unit] = GradientPart(partial(_touched_gradient, shard), total)
            continue
        part = shard.oriented_gradient(held)
        if shard.has_whole_rows and held.is_contiguous():
            alike.setdefault((part.shape, part.dtype, part.device), []).append((shard, part))
        else:  # a copy is not kept until the step: it is made again then
            parts |= _squared([(shard, part)], is_view=False)
    for each in alike.values():
        parts |= _squared(each, is_view=True)
    return parts


def _squared(
    matrices: Sequence[tuple[MatrixShard, Tensor]], *, is_view: bool
) -> dict[int, GradientPart]:
    """Of matrices of one shape: the gradient, ``moment.touch x basis.touch``, a view or a copy."""
    of_rows, norms_sq = squares([part for _, part in matrices])
    parts = {}
    for (shard, part), row_sq, total in zip(matrices, of_rows, norms_sq, strict=True):
        is_read_now = is_view and shard.terms == 1
        read = at_hand(part) if is_read_now else partial(_oriented_term, shard)
        total = total if shard.terms == 1 else total / shard.terms
        parts[shard.unit] = GradientPart(read, total, row_sq)
    return parts


def projected_part(shard: Shard, projected: Projected, state: State) -> GradientPart:
    """The gradient of a shard that the backward pass has projected and freed.

    Raises:
        RuntimeError: the matrix has got another gradient, or another basis since then.
    """
    if shard.gradient() is not None:
        raise RuntimeError(
            f"{shard.name}: the backward pass has projected and freed its gradient, as "
            "gradient_budget asks for, and now it has another one: nothing may be added to .grad, "
            "and DistributedDataParallel needs arg_dist.sketch_only(model)"
        )
    if not projected.fits(state):
        raise RuntimeError(
            f"{shard.name}: its state has changed since the backward pass has projected its "
            "gradient; call zero_grad() and backward() once more (after loading a checkpoint, too)"
        )
    return GradientPart(_freed, projected.norm_sq, term=projected.term)


def _freed() -> Tensor:
    raise AssertionError("a gradient that was projected is not read")


def _oriented_term(shard: MatrixShard) -> Tensor:
    """``moment x basis``: the gradient that a matrix has now, or its term of a mean, in fp32."""
    return _term(shard.oriented_gradient(_held_gradient(shard)).float(), shard)


def _touched_gradient(shard: TensorShard) -> Tensor:
    gradient = shard.touched_gradient(_held_gradient(shard)).to(shard.moment_type)
    return _term(gradient, shard)


def _term(gradient: Tensor, shard: Shard) -> Tensor:
    """``G_i / K``: the sum over the K processes is the mean."""
    return gradient if shard.terms == 1 else gradient / shard.terms


def _held_gradient(shard: Shard) -> Tensor:
    gradient = shard.gradient()
    if gradient is None:
        values = shard.values()
        gradient = values.new_zeros(1, dtype=torch.float32).expand(values.shape)
    return gradient


def mean_sketch(shards: Iterable[Shard], steps: int, projected: Mapping[str, Projected]) -> Tensor:
    """``BUCKETS``, fp64: this process's term of the sketch of all gradients, on the CPU.

    Args:
        shards: matrices and tensors, whose gradients are terms of a mean.
        steps: steps taken before; each has signs of its own.
        projected: as of :meth:`PlanStep.prepared`.
    """
    total = torch.zeros(BUCKETS, dtype=torch.float64, device="cpu")
    for shard in shards:
        known = projected.get(shard.name)
        sketch = own_sketch(shard, steps) if known is None else known.sketch
        if sketch is not None:
            total += sketch.cpu() / shard.terms
    return total


def own_sketch(shard: Shard, steps: int) -> Tensor | None:
    """``BUCKETS``, fp64: the sketch of the gradient that a shard has now; None if it has none."""
    gradient = shard.gradient()
    if gradient is None:
        return None
    return norm_sketch(gradient, f"{shard.name}|{shard.range[0]}|{steps}")


# -- the agreement --------------------------------------------------------------------------------

CLIP_EPS = 1e-6
"""Added to the norm in the denominator, as by torch.nn.utils.clip_grad_norm_."""

LARGEST_NORM_SQ = 1e36
"""Squares and products of larger gradients overflow in fp32."""

OWN_STATE, REFRESHING, COMPARES, APART = 1, 2, 4, 8
"""Flags in the lowest 8 bits of the first word of a report; above them steps and settings."""
STEPS_BIT, SETTINGS_BIT = 8, 32
STEPS = (1 << SETTINGS_BIT - STEPS_BIT) - 1
"""Mask of the number of steps in a report, which is compared only."""


@dataclass(frozen=True)
class Likeness:
    """What must be alike on all processes, in short.

    Attributes:
        settings: checksum of the settings, 31 bits.
        summary: of the tensors that every process holds whole, an fp64 scalar; None: none compared.
        apart: this process has found that its part differs from another copy of the model.
    """

    settings: int = 0
    summary: Tensor | None = None
    apart: bool = False


ALIKE = Likeness()


@dataclass(frozen=True)
class Agreement:
    """The agreed values, equal on every process of a group.

    Attributes:
        norm_sq: ``||G||_F^2`` of each matrix and tensor of the plan.
        kept_sq: ``||P||_F^2`` of each matrix in the previous step.
        rounds: communication rounds of each lane in this step.
        strangers: processes that hold optimizer state saved by another process, or whose step
            count differs from the first process's.
        processes: size of the group.
        refreshing: whether any process reports that a matrix of the optimizer is due for a refresh.
        unlike: whether something that must be alike on all processes seems to differ.
        mean_sq: of gradients that are terms of a mean, the mean's ``||G||^2`` over all of them, if
            it is to be clipped.
    """

    norm_sq: list[float]
    kept_sq: list[float]
    rounds: list[int]
    strangers: list[int]
    processes: int
    refreshing: bool = False
    unlike: bool = False
    mean_sq: float | None = None

    def is_usable(self, names: Sequence[str], *, skip: bool) -> bool:
        """Whether the step can be taken.

        Args:
            names: names of the matrices and tensors.
            skip: skip a step with a non-finite gradient instead of raising.

        Raises:
            RuntimeError: a process holds another process's state.
            FloatingPointError: a gradient is not finite and `skip` is not set.
        """
        if self.strangers:
            raise RuntimeError(
                f"load_state_dict: the optimizer state of process "
                f"{', '.join(map(str, self.strangers))} of {self.processes} does not belong with "
                "process 0's: it was loaded from another process, another number of processes, "
                "another model or another step (or step() was called on some processes only); the "
                "state is sharded: each process must save and load its own"
            )
        bad = self.nonfinite()
        if bad and not skip:
            more = f" and {len(bad) - 1} of {len(names) - 1} others" if len(bad) > 1 else ""
            raise FloatingPointError(
                f"the gradient of {names[bad[0]]}{more} is NaN or infinite (or above 1e18); "
                "this call to step() left its parameters and their state unchanged. Lower the "
                "learning rate, clip gradients, check the batch, or set "
                'nonfinite="skip"'
            )
        return not bad

    def nonfinite(self) -> list[int]:
        """Positions of matrices and tensors whose gradient is NaN, infinite or too large."""
        return [i for i, norm_sq in enumerate(self.norm_sq) if not norm_sq < LARGEST_NORM_SQ]


def agree(
    norms_sq: Sequence[tuple[int, Tensor]],
    kept_sq: Sequence[tuple[int, Tensor]],
    rounds: Sequence[int],
    *,
    own_state: bool,
    steps: int,
    units: int,
    processes: int,
    me: int,
    refreshing: bool = False,
    likeness: Likeness = ALIKE,
    sketch: Tensor | None = None,
) -> Steps[Agreement]:
    """Sum squared norms over all processes, and take the maximum number of rounds per lane.

    Args:
        norms_sq: position and ``||G||^2`` over this process's part of each gradient, fp64 scalars;
            each element is held by exactly one process.
        kept_sq: position and ``||P||^2`` over this process's rows, fp64 scalars.
        rounds: rounds that this process's matrices need in each lane.
        own_state: whether this process's optimizer state is its own.
        steps: steps this process's optimizer has taken.
        units: number of matrices and tensors of the plan.
        processes: size of the group.
        me: this process's index.
        refreshing: whether this process has matrices due for a refresh.
        likeness: what must be alike on all processes.
        sketch: of this process's gradients, from which the norm of their mean follows
            (:mod:`arg_dist.subspace.norm_sketch`); on all processes or none.
    """
    device = norms_sq[0][1].device if norms_sq else torch.device("cpu")
    part = torch.zeros(units, 2, dtype=torch.float64, device=device)
    for column, values in enumerate((norms_sq, kept_sq)):
        _fill_in(part[:, column], values)
    all_units = ((0, units),) * processes
    all_rows = ((0, processes),) * processes
    flags = OWN_STATE * own_state + REFRESHING * refreshing
    mine = _report(flags, steps, rounds, likeness)
    sketches: tuple[Exchange, ...] = ()
    if sketch is not None:
        everything = ((0, len(sketch)),) * processes
        sketches = (Exchange(sketch, everything, everything),)
    answers = yield (
        Exchange(part, all_units, all_units),
        Exchange(mine, even_rows(processes, processes), all_rows),
        *sketches,
    )
    totals, reports = answers[0].tolist(), answers[1]
    own = Agreement(
        norm_sq=[row[0] for row in totals],
        kept_sq=[row[1] for row in totals],
        rounds=list(rounds),
        strangers=[] if own_state else [0],
        processes=processes,
        refreshing=refreshing,
        unlike=likeness.apart,
        mean_sq=float(answers[2].square().sum()) if sketches else None,
    )
    return own if processes == 1 else _with_all(own, reports)


def _with_all(own: Agreement, reports: Tensor) -> Agreement:
    """The agreement, from what one process knows and the reports of all.

    Args:
        own: the agreement of a process by itself.
        reports: ``processes x (2 + lanes)``, int64, of :func:`_report`.
    """
    words, summaries = reports[:, 0], reports[:, 1].contiguous().view(torch.float64)
    taken = words >> STEPS_BIT & STEPS
    is_stranger = (words & OWN_STATE == 0) | (taken != taken[0])
    told = is_stranger.any(), (words & REFRESHING).any(), _are_unlike(words, summaries)
    # one read for all of them
    strange, refreshes, unlike, *most = torch.cat(
        [torch.stack(told).to(torch.int64), reports[:, 2:].amax(0)]
    ).tolist()
    return replace(
        own,
        rounds=most,
        strangers=is_stranger.nonzero().flatten().tolist() if strange else [],
        refreshing=bool(refreshes),
        unlike=bool(unlike),
    )


def _report(flags: int, steps: int, rounds: Sequence[int], likeness: Likeness) -> Tensor:
    """What this process tells each other one: ``1 x (2 + lanes)``, int64."""
    compares = likeness.summary is not None
    flags += COMPARES * compares + APART * likeness.apart
    first = flags | (steps & STEPS) << STEPS_BIT | likeness.settings << SETTINGS_BIT
    report = torch.tensor([[first, 0, *rounds]], dtype=torch.int64, device="cpu")
    if likeness.summary is not None:
        report = report.to(likeness.summary.device)
        report[0, 1] = likeness.summary.view(torch.int64)
    return report


def _are_unlike(words: Tensor, summaries: Tensor) -> Tensor:
    """A bool: whether flags, settings or summaries differ, or a process has found a difference.

    Args:
        words: ``processes``, int64, the first of each report.
        summaries: ``processes``, fp64, the second; NaN equals NaN.
    """
    alike = words >> SETTINGS_BIT == words[0] >> SETTINGS_BIT
    alike &= words & COMPARES == words[0] & COMPARES
    alike &= words & APART == 0
    alike &= torch.isclose(summaries, summaries[0], rtol=0.0, atol=TOLERANCE, equal_nan=True)
    return ~alike.all()


def _fill_in(column: Tensor, values: Sequence[tuple[int, Tensor]]) -> None:
    """Write scalars to their positions in a column; one copy from each device.

    Args:
        column: ``units``.
        values: positions and scalars, on any devices.
    """
    for device in dict.fromkeys(value.device for _, value in values):
        there = [(unit, value) for unit, value in values if value.device == device]
        scalars = torch.stack([value for _, value in there])
        column[[unit for unit, _ in there]] = scalars.to(column.device)


# -- the step -------------------------------------------------------------------------------------

TOGETHER, TOGETHER_ON_DEVICE = 2**17, 2**25
"""Bytes of weights in fp32 up to which matrices have their work done together, on CPUs and on GPUs:
beyond it operators take longer than it takes to start them, and what passes meanwhile would become
memory."""


def batches(shards: Sequence[Shard]) -> list[range]:
    """Positions of shards, in order, divided into batches whose work is done together."""
    on_cpu = all(in_host_memory(shard.fragment.target) for shard in shards)
    limit = TOGETHER if on_cpu else TOGETHER_ON_DEVICE
    starts, filled = [0], 0
    for position, shard in enumerate(shards):
        if position > starts[-1] and filled + shard.held_bytes > limit:
            starts.append(position)
            filled = 0
        filled += shard.held_bytes
    return [range(*ends) for ends in pairwise([*starts, len(shards)])] if shards else []


def rounds_of(shard: Shard, state: State, settings: Sequence[AdaRankGradConfig]) -> int:
    """Communication rounds that a shard's step may take."""
    if not shard.is_shared or not isinstance(shard, MatrixShard):
        return int(shard.is_shared) + int(shard.terms > 1)
    steady, refreshing = rounds_of_matrix(shard.sharding, settings[shard.group])
    return refreshing if is_due(state) else steady


@dataclass
class PlanStep:
    """One step on the tensors of a plan, which changes nothing before :meth:`take`.

    Attributes:
        plan: the plan.
        states: this process's part of the state of each matrix and tensor, by unit.
        settings: settings of the parameter groups of the call.
        stagger: as of :class:`arg_dist.algorithm.StepFacts`.
        gradients: this process's part of each gradient, by unit; released as they are used.
        agreed: what all processes know, once they agree.
    """

    plan: Plan
    states: dict[int, State]
    settings: Sequence[AdaRankGradConfig]
    stagger: int
    gradients: dict[int, GradientPart]
    agreed: Agreement

    @classmethod
    def prepared(
        cls,
        plan: Plan,
        states: dict[int, State],
        settings: Sequence[AdaRankGradConfig],
        stagger: int,
        *,
        own_state: bool,
        steps: int,
        refreshing: bool,
        projected: Mapping[str, Projected] = MappingProxyType({}),
        likeness: Likeness = ALIKE,
        reach: Callable[[Steps[Agreement]], Agreement] = run_local,
    ) -> PlanStep:
        """Read the gradients, and agree with the other processes.

        Args:
            plan: the plan.
            states: this process's part of the states, by unit.
            settings: settings of the parameter groups of the call.
            stagger: as of :class:`arg_dist.algorithm.StepFacts`.
            own_state: as of :func:`agree`.
            steps: as of :func:`agree`.
            refreshing: as of :func:`agree`.
            projected: gradients that the backward pass has projected and freed, by name.
            likeness: as of :func:`agree`.
            reach: runs the agreement with the other processes, if there are any.
        """
        gradients = gradient_parts(each for each in plan.shards if each.name not in projected)
        gradients |= {
            shard.unit: projected_part(shard, projected[shard.name], states[shard.unit])
            for shard in plan.shards
            if shard.name in projected
        }
        limit = settings[0].max_grad_norm
        norms = [(unit, gradient.norm_sq) for unit, gradient in gradients.items()]
        kept = [(unit, part) for unit, state in states.items() for part in kept_before(state)]
        agreement = agree(
            norms,
            kept,
            [
                max((rounds_of(shard, states[shard.unit], settings) for shard in shards), default=0)
                for shards in plan.shards_by_lane
            ],
            own_state=own_state,
            steps=steps,
            units=len(plan.names),
            processes=plan.communicator.size,
            me=plan.communicator.me,
            refreshing=refreshing,
            likeness=likeness,
            sketch=(
                mean_sketch(plan.shards, steps, projected)
                if plan.terms and limit is not None
                else None
            ),
        )
        prepared = cls(plan, states, settings, stagger, gradients, reach(agreement))
        if limit is not None:
            prepared.clip(limit)
        return prepared

    def clip(self, limit: float) -> None:
        """Scale the gradients, in place, to a norm of all of them together of at most `limit`."""
        agreed = self.agreed
        total = sum(agreed.norm_sq) if agreed.mean_sq is None else agreed.mean_sq
        if not limit**2 < total < math.inf:
            return
        factor = limit / (total**0.5 + CLIP_EPS)
        for shard in self.plan.shards:
            gradient = shard.gradient()
            if gradient is not None:
                gradient.mul_(factor)
            part = self.gradients[shard.unit]
            if part.row_sq is not None:
                part.row_sq.mul_(factor**2)
            if part.term is not None:
                part.term.scale_(factor)
        self.agreed = replace(agreed, norm_sq=[each * factor**2 for each in agreed.norm_sq])

    def take(self, allowed: Allowed | None = None) -> None:
        """Run the algorithm on every matrix and tensor; `allowed` is None without a budget."""
        if self.plan.is_alone:
            self._step_alone(self.plan.shards, allowed)
            return
        lanes = [partial(self._lane, shards, allowed) for shards in self.plan.shards_by_lane]
        run_lanes(lanes, self.plan.communicator, self.agreed.rounds)

    def _lane(self, shards: Sequence[Shard], allowed: Allowed | None) -> Lane[Any]:
        """A lane: shared shards communicate, others step while messages are in flight."""
        shared = [shard for shard in self._moving(shards) if shard.is_shared]

        def finish(results: dict[int, Any]) -> None:
            updates = Updates()
            for i in list(results):  # each is freed as it is applied
                shard = shared[i]
                settings, number = self.settings[shard.group], self._number(shard)
                updates.add(shard, results.pop(i), settings, number)
            updates.apply()

        return Lane(
            (self._computation(shard, allowed) for shard in shared),
            finish,
            "the step",
            [shard.name for shard in shared],
            lambda: self._step_alone([each for each in shards if not each.is_shared], allowed),
            batches(shared),
        )

    def _step_alone(self, shards: Iterable[Shard], allowed: Allowed | None) -> None:
        """The steps of shards that no other process holds a part of."""
        moving = self._moving(shards)
        for batch in batches(moving):
            self._step_together([moving[i] for i in batch], allowed)

    def _step_together(self, shards: Sequence[Shard], allowed: Allowed | None) -> None:
        updates = Updates()

        def finish(position: int, update: Any) -> None:
            shard = shards[position]
            updates.add(shard, update, self.settings[shard.group], self._number(shard))

        run_together([self._computation(shard, allowed) for shard in shards], finish)
        updates.apply()

    def _number(self, shard: Shard) -> int:
        """Number of the steps of a matrix or tensor."""
        return int(self.states[shard.unit].get("step", 0))

    def _moving(self, shards: Iterable[Shard]) -> list[Shard]:
        """Those that have, or have had, a gradient."""
        norms = self.agreed.norm_sq
        return [shard for shard in shards if self.states[shard.unit] or norms[shard.unit] > 0]

    def _computation(self, shard: Shard, allowed: Allowed | None) -> Steps[Any]:
        """The algorithm on this shard: AdaRankGrad for matrices, Adam for the rest."""
        settings, state = self.settings[shard.group], self.states[shard.unit]
        gradient = self.gradients.pop(shard.unit)
        if isinstance(shard, MatrixShard):
            facts = StepFacts(
                name=shard.name,
                norm_sq=self.agreed.norm_sq[shard.unit],
                kept_sq=self.agreed.kept_sq[shard.unit],
                phase=shard.phase,
                stagger=self.stagger,
                allowed=None if allowed is None else allowed(shard, state, settings),
            )
            read, sharding = gradient.read, shard.sharding
            if sharding.terms is not None:
                device, term = shard.fragment.target.device, gradient.term
                return step_of_terms(read, device, state, sharding, settings, facts, term=term)
            assert gradient.row_sq is not None
            return low_rank_step(read, gradient.row_sq, state, sharding, settings, facts)
        assert isinstance(shard, TensorShard)
        return adam_step(gradient.read(), state, shard.sharding, settings, me=shard.me)


Allowed = Callable[[Shard, State, AdaRankGradConfig], int | None]
"""The largest rank that a budget permits a shard's matrix now."""


class Updates:
    """The algorithm's results, on their way to the weights held.

    Each is applied at once, except where a kernel takes a list.
    """

    def __init__(self) -> None:
        self._alike: dict[Any, list[tuple[Tensor | None, ...]]] = {}

    def add(self, shard: Shard, update: Any, settings: AdaRankGradConfig, number: int = 0) -> None:
        """Add the result for a shard, of its step `number`; None changes nothing."""
        by_chance = number if settings.weight_rounding == "random" else None
        if isinstance(update, LowRankUpdate):
            assert isinstance(shard, MatrixShard)
            self._add_low_rank(shard, update, settings, by_chance)
        elif update is not None:
            assert isinstance(shard, TensorShard)
            lr = settings.lr * settings.full_rank_scale
            keep = 1 - lr * settings.weight_decay
            shard.apply(update, keep=keep, step=-lr, by_chance=by_chance)

    def _add_low_rank(
        self,
        shard: MatrixShard,
        update: LowRankUpdate,
        settings: AdaRankGradConfig,
        by_chance: int | None,
    ) -> None:
        keep = 1 - settings.lr * settings.weight_decay
        direction, basis, factors, outside = update
        step, precision = -settings.lr * settings.scale, settings.matmul_precision
        gradient = None if factors is None else shard.gradient()
        views = None if by_chance is not None else shard.oriented_weights(gradient, outside)
        if views is None:
            with lowered_precision(precision):
                shard.apply(
                    *(direction, basis, factors, gradient, outside),
                    keep=keep,
                    step=step,
                    by_chance=by_chance,
                )
            return
        weights, added = views
        if gradient is None:
            factors = None
        has = factors is not None, added is not None
        kind = weights.shape, basis.shape, has, keep, step, precision
        operands = weights, direction, basis, factors, added
        if available(weights.device):
            self._alike.setdefault((weights.device, *kind), []).append(operands)
        else:
            _apply([operands], keep, step, precision)

    def apply(self) -> None:
        """Apply those that wait."""
        for (*_, keep, step, precision), each in self._alike.items():
            _apply(each, keep, step, precision)
        self._alike.clear()


def _apply(
    operands: Sequence[tuple[Tensor | None, ...]],
    keep: float,
    step: float,
    precision: MatmulPrecision,
) -> None:
    W, N, Q, phi, E = (None if each[0] is None else each for each in zip(*operands, strict=True))
    assert W is not None and N is not None and Q is not None
    apply(W, N, Q, phi, E, keep=keep, step=step, precision=precision)
