"""AdaRankGrad on one matrix, and Adam on everything else, as driver-independent computations.

arXiv 2410.17881, algorithm 3; read :mod:`arg_dist.simple` first, where all of it is in one piece.
What a state holds is described in :mod:`arg_dist.subspace.state`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arg_dist.config import AdaRankGradConfig
from arg_dist.library_internals import FUSED_ADAMW
from arg_dist.subspace import compact
from arg_dist.subspace.budget import Claim
from arg_dist.subspace.codes import Coded, coded_bytes, coded_zeros, decode, encode
from arg_dist.subspace.compact import LEVELS, NUMBER_BYTES, POWERS, Precision
from arg_dist.subspace.distributed import (
    DimensionSharding,
    Exchange,
    MatrixSharding,
    Steps,
    from_home,
    gather,
    gather_each,
    relayed_sum,
    row_count,
    select_rows,
    sum_scatter,
    sum_scatter_both,
    together,
)
from arg_dist.subspace.norms import in_host_memory, row_squares
from arg_dist.subspace.products import MatmulPrecision, lowered_precision, project
from arg_dist.subspace.range_finder import Part, leading_directions
from arg_dist.subspace.rank import choose_rank, exit_early, gap_after_decay, gap_until_next
from arg_dist.subspace.residual import (
    SCALES_ROWS,
    limit_growth,
    matched_factors,
    orthogonalized,
    residual_of,
    scaled_factors,
)
from arg_dist.subspace.rounding import to_bf16
from arg_dist.subspace.sketch import random_signs
from arg_dist.subspace.state import OF_EACH_DIRECTION, SCALES, State
from arg_dist.subspace.transport import transport_moments

STACKED = 2**25
"""Bytes of residuals that are orthogonalized in one batch on a GPU; of larger ones few suffice."""

PROBES = 8
"""Random signs that tell the norm of a mean which is not formed, to 3 % (one deviation)."""

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Types by `polar_precision` and `sync_precision`."""


@dataclass(frozen=True)
class StepFacts:
    """What every process that holds a part of a matrix knows of it before its step.

    Attributes:
        name: the matrix's name, which seeds its sketches.
        norm_sq: ``||G||_F^2`` over all processes; finite. Of a mean of terms a limit: the mean of
            their ``||G_i||_F^2``.
        kept_sq: ``||P||_F^2`` of the previous step, over all processes.
        phase: in [0, 1): staggers the refreshes of different matrices, even if all gradients decay
            in one step.
        stagger: steps over which early refreshes are staggered, at most `min_gap`; None: `min_gap`.
        allowed: largest rank the budget permits at a refresh; None without a budget.
    """

    name: str
    norm_sq: float
    kept_sq: float
    phase: float
    stagger: int | None = None
    allowed: int | None = None


class LowRankUpdate(NamedTuple):
    """Update of a matrix: ``W <- W - lr scale (N Q^T + phi G)``, with one phi per row, or
    ``W <- W - lr scale (N Q^T + O)``.

    Attributes:
        direction: ``moment.update x rank``, N; with a scaled residual, N - phi P.
        basis: ``basis.touch x rank``, Q.
        factors: ``moment.update``, phi; None unless the residual's rows are scaled.
        outside: ``elements.update``, O; None unless the residual is orthogonalized.
    """

    direction: Tensor
    basis: Tensor
    factors: Tensor | None = None
    outside: Tensor | None = None


class Choice(NamedTuple):
    """What a refresh decides from the energies of the directions found.

    Attributes:
        rank: number of directions that the new basis has.
        energy: share of ``||G||^2`` kept.
        spectrum: share of ``||G||^2`` of each direction up to the largest rank; None without a
            budget.
    """

    rank: int
    energy: float
    spectrum: list[float] | None = None


Bounds = tuple[int, int]
"""Smallest and largest rank."""
Choose = Callable[
    [Tensor, float | Tensor, Bounds, int | None, AdaRankGradConfig, StepFacts], Choice
]
"""Decides a rank; arguments as of :func:`chosen_by_energy`."""


class NewBasis(NamedTuple):
    """Result of a refresh: the basis, and what transporting the moments requires.

    Attributes:
        vectors: ``basis.touch x rank``.
        energies: ``rank``, fp64.
        rotation: ``rank x old rank``, or None at the first refresh.
        choice: what was decided from the energies.
    """

    vectors: Tensor
    energies: Tensor
    rotation: Tensor | None
    choice: Choice


def chosen_by_energy(
    energies: Tensor,
    norm_sq: float | Tensor,
    bounds: Bounds,
    before: int | None,
    settings: AdaRankGradConfig,
    facts: StepFacts,
) -> Choice:
    """The rank of :func:`arg_dist.subspace.rank.choose_rank`.

    Args:
        energies: ``width``, fp64, descending: ``||G q_i||^2``; in host memory.
        norm_sq: ``||G||_F^2``.
        bounds: smallest and largest rank that the settings allow the matrix.
        before: the previous rank; None at the first refresh.
        settings: the settings of the matrix's parameter group.
        facts: what is known of the matrix.
    """
    spectrum, norm_sq = None, float(norm_sq)
    smallest, largest = bounds
    if facts.allowed is not None:  # the spectrum beyond it lets the rank rise again later
        spectrum = (energies[:largest] / norm_sq).tolist()
        largest = min(largest, facts.allowed)
    rank = choose_rank(
        energies,
        norm_sq,
        energy=settings.energy,
        smallest=smallest,
        largest=largest,
        before=before,
        hysteresis=settings.hysteresis,
        multiple=settings.rank_multiple,
    )
    return Choice(rank, min(1.0, float(energies[:rank].sum()) / norm_sq), spectrum)


def low_rank_step(
    gradient: Part,
    row_sq: Tensor,
    state: State,
    sharding: MatrixSharding,
    settings: AdaRankGradConfig,
    facts: StepFacts,
    *,
    choose: Choose = chosen_by_energy,
) -> Steps[LowRankUpdate | None]:
    """One step of AdaRankGrad on one matrix; `state` is updated in place.

    Args:
        gradient: this process's part of G.
        row_sq: ``moment.touch``, fp32, ``||G_i||^2`` over that part.
        state: the matrix's state; empty before its first step.
        sharding: how the matrix is distributed over the processes.
        settings: the settings of its parameter group.
        facts: what is known of the matrix; equal on all processes.
        choose: decides the rank at a refresh; the one read of values on which requests depend.

    Returns:
        The update, or None if the gradient has been zero since the start.
    """
    me, moment = sharding.me, sharding.moment
    new = None
    if facts.norm_sq > 0 and is_due(state):
        new = yield from refresh(gradient, row_sq.device, state, sharding, settings, facts, choose)
        basis = new.vectors
    elif state:
        basis = yield from present_basis(state, sharding)
    else:
        return None
    product = yield from projection(gradient, basis, sharding, settings)
    if settings.residual in SCALES_ROWS:
        parts = product, row_sq
        projected, row_sq = yield from sum_scatter_both(parts, moment.touch, moment.keep, me)
    else:
        projected = yield from sum_scatter(product, moment.touch, moment.keep, me)
    del product
    matched = row_sq if settings.residual == "matched" else None
    direction, projected_sq, factors = yield from step_in_basis(
        new, projected, state, sharding, settings, facts, matched
    )
    if settings.residual == "none":
        direction = yield from gather(direction, moment.keep, moment.update, me)
        return LowRankUpdate(direction, basis)
    if settings.residual == "orthogonalized":
        outside = yield from _outside(
            gradient, projected, basis, facts.norm_sq, state, sharding, settings
        )
        elements = sharding.elements
        both = (
            (direction, moment.keep, moment.update),
            (outside, sharding.at_home(elements.size), elements.update),
        )
        direction, outside = yield from gather_each(both, me)
        return LowRankUpdate(direction, basis, outside=outside)
    if factors is None:
        factors, state["residual_norm"] = yield from limit_growth(
            scaled_factors(direction, projected_sq),
            projected_sq,
            row_sq,
            state.get("residual_norm"),
            sharding,
            growth=settings.residual_growth,
        )
        without_projection(direction, factors, projected)
    rows = moment.keep, moment.update
    direction, factors = yield from gather_each([(direction, *rows), (factors, *rows)], me)
    return LowRankUpdate(direction, basis, factors)


def present_basis(state: State, sharding: MatrixSharding) -> Steps[Tensor]:
    """``basis.touch x rank``: the basis of the last refresh."""
    return (yield from gather(basis_of(state), sharding.store, sharding.basis.touch, sharding.me))


def at_hand(part: Tensor) -> Part:
    """Of a part that is there: nothing is to be made."""
    return lambda: part


def projection(
    gradient: Part, basis: Tensor, sharding: MatrixSharding, settings: AdaRankGradConfig
) -> Steps[Tensor]:
    """``moment.touch x rank``: ``G Q``, of this process's part of G."""
    kind = row_count(sharding.moment.touch[sharding.me]), basis.shape, basis.device
    product: Tensor = yield from together(
        _projections, gradient, basis, kind=kind, precision=settings.matmul_precision
    )
    return product


def _projections(
    gradients: Sequence[Part], bases: Sequence[Tensor], *, precision: MatmulPrecision
) -> list[Tensor]:
    """Each ``moment.touch x rank``."""
    parts = [gradient() for gradient in gradients]
    return list(project(parts, bases, precision=precision, squares=False)[0])


class Inside(NamedTuple):
    """What a step does inside the basis.

    Attributes:
        direction: ``moment.keep x rank``, N; N - phi P with factors.
        projected_sq: ``moment.keep``, ``||P_i||^2``.
        factors: ``moment.keep``, phi of the rule `matched`; None under another one.
    """

    direction: Tensor
    projected_sq: Tensor
    factors: Tensor | None


def step_in_basis(
    new: NewBasis | None,
    projected: Tensor,
    state: State,
    sharding: MatrixSharding,
    settings: AdaRankGradConfig,
    facts: StepFacts,
    row_sq: Tensor | None = None,
) -> Steps[Inside]:
    """Advance the moments, after a refresh in their new basis; what is left is the residual.

    Args:
        new: the new basis; None without a refresh.
        projected: ``moment.keep x rank``, P.
        state: the matrix's state, updated.
        sharding: how the matrix is distributed over the processes.
        settings: the settings of its parameter group.
        facts: what is known of the matrix.
        row_sq: ``moment.keep``, ``||G_i||^2``, if the residual is `matched`.
    """
    if new is not None:
        adopt(new, projected, state, sharding, settings, facts.phase)
    else:
        fit(state, settings.state_dtype)
        refresh_early(state, settings, facts)
    inside: Inside
    inside, state["kept_sq"] = yield from together(
        _steps_inside,
        projected,
        state,
        row_sq,
        kind=(projected.shape, projected.device, row_sq is None),
        adam=next_step(state, settings),
        dimension=sharding.basis.size,
        precision=settings.state_dtype,
    )
    state["since_refresh"] += 1
    if not settings.remembers_residual:
        forget_momentum(state)
    return inside


def _steps_inside(
    projected: Sequence[Tensor],
    states: Sequence[State],
    row_sqs: Sequence[Tensor | None],
    *,
    adam: AdamStep,
    dimension: int,
    precision: Precision,
) -> list[tuple[Inside, Tensor]]:
    """Of k matrices of one shape, what they do inside their bases, and ``||P||^2``, fp64."""
    count, (rows, rank) = len(projected), projected[0].shape
    N = projected[0].new_zeros(count, rows, rank)
    advance_moments(list(N), projected, states, adam, precision)
    P = as_one(projected).view(-1, rank)
    inside_sq = row_squares(P)
    total = inside_sq.view(count, rows).sum(1, dtype=torch.float64)
    kept_sq = [total.new_empty(1) for _ in range(count)]  # no views: they outlive the step
    torch.split_with_sizes_copy(total, [1] * count, out=kept_sq)
    factors: Sequence[Tensor | None] = [None] * count
    if row_sqs[0] is not None:
        of_all = as_one(row_sqs).view(-1)
        phi = matched_factors(N.view(-1, rank), inside_sq, of_all, dimension=dimension)
        without_projection(N.view(-1, rank), phi, P)
        factors = list(phi.view(count, rows))
    each = map(Inside, N, inside_sq.view(count, rows), factors)
    return [(inside, kept.view(())) for inside, kept in zip(each, kept_sq, strict=True)]


def without_projection(direction: Tensor, factors: Tensor, projected: Tensor) -> None:
    """N <- N - phi P, in place; ``rows x rank``, ``rows`` and ``rows x rank``."""
    # N Q^T + phi (G - P Q^T) = (N - phi P) Q^T + phi G, and each process has its part of G
    direction.addcmul_(factors[:, None], projected, value=-1)


def as_one(matrices: Sequence[Any]) -> Tensor:
    """``k x ...``: tensors of one shape; a copy, except of a single one."""
    return matrices[0][None] if len(matrices) == 1 else torch.stack(list(matrices))


def adam_step(
    gradient: Tensor, state: State, side: DimensionSharding, settings: AdaRankGradConfig, *, me: int
) -> Steps[Tensor]:
    """One step of Adam on the elements of a tensor, distributed over the processes by `side`.

    Args:
        gradient: ``touch``, this process's elements, or its term of them, in the type of new
            moments.
        state: exp_avg and exp_avg_sq, ``keep``, and step; empty before the first step.
        side: how the elements are distributed over the processes.
        settings: the settings of the parameter group.
        me: this process's index in the group.

    Returns:
        ``update``, the direction.
    """
    has_terms = side.terms > 1
    if has_terms:
        total = yield sent_term(gradient, side, settings)
        gradient = summed(total, gradient.dtype)
    precision = settings.full_rank_state
    if precision != "fp32":
        precision = compact.precision_of_tensor(gradient.numel(), precision)
    if not state:
        state.update(step=0, **compact.empty_moments(gradient, precision))
    fit(state, precision)
    # moments that were loaded keep their type
    gradient = gradient.double() if state["exp_avg"].dtype == torch.float64 else gradient.float()
    direction = yield from together(
        _directions,
        gradient,
        state,
        kind=(gradient.dtype, gradient.device),
        adam=next_step(state, settings),
        precision=precision,
    )
    if not has_terms:
        return (yield from gather(direction, side.keep, side.update, me))
    sent = direction.to(sent_type(direction.dtype, settings))
    return (yield from gather(sent, side.keep, side.update, me)).to(direction.dtype)


def sent_type(dtype: torch.dtype, settings: AdaRankGradConfig) -> torch.dtype:
    """The type in which `sync_precision` sends numbers of a type."""
    return torch.bfloat16 if settings.sync_precision == "bf16" else dtype


def sent_term(term: Tensor, side: DimensionSharding, settings: AdaRankGradConfig) -> Exchange:
    """This process's term of a sum, ``touch x ...``, of which each process wants the rows `keep`.

    In bf16 the terms arrive one by one, as their sum is formed in fp32.
    """
    dtype = sent_type(term.dtype, settings)
    return Exchange(term.to(dtype), side.touch, side.keep, stacked=dtype != term.dtype)


def summed(arrived: Tensor, dtype: torch.dtype) -> Tensor:
    """``keep x ...``: the sum of what :func:`sent_term` of all processes sent."""
    return arrived if arrived.dtype == dtype else arrived.to(dtype).sum(0)


def _outside(
    gradient: Part,
    projected: Tensor,
    basis: Tensor,
    norm_sq: float,
    state: State,
    sharding: MatrixSharding,
    settings: AdaRankGradConfig,
) -> Steps[Tensor]:
    """``elements`` at home, none elsewhere: what the orthogonalized residual adds to the update.

    G is sent, not S: the home process then needs no P, and no other needs rows of P for S.

    Args:
        gradient: this process's part of G.
        projected: ``moment.keep x rank``, P.
        basis: ``basis.touch x rank``, Q.
        norm_sq: ``||G||_F^2``.
        state: the matrix's state; the momentum of the residual is updated.
        sharding: how the matrix is distributed over the processes.
        settings: the settings of its parameter group.
    """
    side, elements, me = sharding.basis, sharding.elements, sharding.me
    part_type = TYPES[settings.polar_precision]
    part = sharding.flat(gradient()).to(part_type)
    kept = select_rows(basis, side.touch[me], side.keep[me])
    parts = (
        (part, elements.keep, sharding.at_home(elements.size)),
        (kept, side.keep, sharding.at_home(side.size)),
    )
    del part
    whole, Q = yield from gather_each(parts, me)
    del parts
    residual = whole
    if me == sharding.home:
        G = sharding.matrix(whole).float()
        del whole  # or it would be held beside what is made of it
        with lowered_precision(settings.matmul_precision):
            P = projected if len(projected) == len(G) else G @ Q
            is_copy = len(sharding.owners) > 1 or part_type != torch.float32
            residual = residual_of(G, P, Q, norm_sq, overwrite=is_copy)
        del G, P
    return (yield from at_full_size(residual, Q, norm_sq**0.5, state, sharding, settings))


def at_full_size(
    residual: Tensor,
    basis: Tensor,
    norm: float,
    state: State,
    sharding: MatrixSharding,
    settings: AdaRankGradConfig,
) -> Steps[Tensor]:
    """``elements`` at home, none elsewhere: the residual orthogonalized, or its momentum.

    Args:
        residual: ``moment x basis`` at home, ``S / ||G||``, fp32; overwritten.
        basis: ``basis x rank`` at home, Q.
        norm: ``||G||``, or a limit for it.
        state: the matrix's state; the momentum of the residual is updated.
        sharding: how the matrix is distributed over the processes.
        settings: the settings of its parameter group.
    """
    dtype = TYPES[settings.polar_precision]
    S = residual.to(dtype)
    if settings.remembers_residual:
        blend_momentum(S, norm, state, sharding, settings)
    if sharding.me != sharding.home:
        return S
    del residual
    factor: Tensor = yield from together(
        _orthogonalized_each,
        S,
        basis.to(dtype),
        kind=(S.shape, basis.shape, S.device, dtype),
        outputs_are_moment=sharding.outputs_are_moment,
        steps=settings.polar_steps,
    )
    return sharding.flattened(factor)


def _orthogonalized_each(
    residuals: Sequence[Tensor], bases: Sequence[Tensor], **options: Any
) -> list[Tensor]:
    """:func:`arg_dist.subspace.residual.orthogonalized` of k matrices of one shape."""
    # on a CPU each alone, or its rounding would depend on the others
    count = 1 if in_host_memory(residuals[0]) else STACKED // max(1, residuals[0].nbytes)
    if count <= 1:
        each = zip(residuals, bases, strict=True)
        return [orthogonalized(S, Q, **options) for S, Q in each]
    factors: list[Tensor] = []
    for first in range(0, len(residuals), count):
        some = slice(first, first + count)
        factors += orthogonalized(as_one(residuals[some]), as_one(bases[some]), **options)
    return factors


def blend_momentum(
    residual: Tensor,
    norm: float,
    state: State,
    sharding: MatrixSharding,
    settings: AdaRankGradConfig,
) -> None:
    """Advance the residual's momentum, and its norms on all processes; blend it in, in place.

    Args:
        residual: ``moment x basis`` at home, ``S / ||G||``; nothing elsewhere.
        norm: ``||G||``, or a limit for it.
        state: the matrix's state.
        sharding: how the matrix is distributed over the processes.
        settings: the settings of its parameter group.
    """
    decay, bits = settings.residual_momentum, settings.residual_bits
    is_home = sharding.me == sharding.home
    if "residual_codes" not in state:
        held = sharding.elements.size if is_home else 0
        codes, scales = coded_zeros(held, bits, residual.device)
        state["residual_codes"], state["residual_scales"] = codes, scales
        state["residual_reach"] = 0.0
    # rho <- beta rho + (1 - beta) ||G||, so that ||R|| <= rho
    state["residual_reach"] = decay * state["residual_reach"] + (1 - decay) * norm
    if not is_home:
        return
    # the norm of what is orthogonalized is at most (1 - beta) ||G|| + beta rho
    reach = (1 - decay) * norm + decay * state["residual_reach"]
    coded = Coded(state["residual_codes"], state["residual_scales"])
    R = decode(coded, residual.numel()).view(residual.shape)
    # R <- beta R + (1 - beta) S
    R.mul_(decay).add_(residual, alpha=(1 - decay) * norm)
    # S <- (1 - beta) S + beta R, as Nesterov's
    share = 1 / reach if reach > 0 else 0.0
    residual.mul_((1 - decay) * norm * share).add_(R, alpha=decay * share)
    state["residual_codes"], state["residual_scales"] = encode(R.view(-1), bits)


def forget_momentum(state: State) -> None:
    """Drop the residual's momentum of steps that had other settings."""
    for key in ("residual_codes", "residual_scales", "residual_reach"):
        state.pop(key, None)


def momentum_bytes(elements: int, settings: AdaRankGradConfig) -> int:
    """Bytes of the momentum of a matrix's residual, on its home process; 0 without momentum."""
    return coded_bytes(elements, settings.residual_bits) if settings.remembers_residual else 0


def read(state: Mapping[str, Any], key: str) -> Tensor:
    """The numbers under a key, in fp32 (fp64 if they are kept in it); the state's own if possible.

    Args:
        state: of a matrix or tensor.
        key: ``basis``, ``exp_avg`` or ``exp_avg_sq``.
    """
    kept: Tensor = state[key]
    if kept.dtype in LEVELS:
        return compact.decode(kept, state[SCALES[key]], POWERS[key])
    return kept.float() if kept.dtype == torch.bfloat16 else kept


def keep(state: State, key: str, numbers: Tensor, precision: Precision, *, step: int = 0) -> None:
    """Keep numbers under a key in a precision; those in fp64 as they are.

    Args:
        state: of a matrix or tensor, changed in place.
        key: ``basis``, ``exp_avg`` or ``exp_avg_sq``.
        numbers: ``rows x rank``, or ``elements``; fp32 or fp64.
        precision: how they are kept.
        step: number of the step, by which numbers are rounded up or down.
    """
    state.pop(SCALES[key], None)
    if numbers.dtype == torch.float64 or precision == "fp32":
        state[key] = numbers
    elif precision == "bf16":
        state[key] = numbers.bfloat16() if key == "basis" else to_bf16(numbers, step)
    else:
        state[key], state[SCALES[key]] = compact.encode(numbers, key, step)


def precision_of(state: Mapping[str, Any], key: str) -> Precision:
    """How the numbers under a key are kept."""
    dtype = state[key].dtype
    return "int8" if dtype in LEVELS else "bf16" if dtype == torch.bfloat16 else "fp32"


def fit(state: State, precision: Precision) -> None:
    """Keep all of a state in a precision, in place, if it was loaded in another one."""
    for key in POWERS.keys() & state.keys():
        if precision_of(state, key) != precision and state[key].dtype != torch.float64:
            keep(state, key, read(state, key), precision)


def kept_before(state: State) -> list[Tensor]:
    """``||P||^2`` of the last step, over this process's rows; nothing of a tensor."""
    return [state["kept_sq"]] if "kept_sq" in state else []


def is_due(state: State) -> bool:
    """Whether the next step refreshes; decided by the previous step."""
    return not state or state["since_refresh"] >= state["gap"]


def refresh_next(state: State) -> None:
    """Make a matrix's next step refresh, whatever was scheduled."""
    state["gap"] = 0


def age(state: State) -> float:
    """Steps since the last refresh; infinite before the first."""
    return float(state.get("since_refresh", math.inf))


def stored_basis(state: State) -> Tensor | None:
    """This process's part of the basis as it is kept, in whichever type; None before the first."""
    return state.get("basis")


def basis_of(state: State) -> Tensor:
    """``store x rank``: this process's part of the basis."""
    return read(state, "basis")


def postpone(state: State) -> None:
    """Let a matrix whose refresh is due keep its basis for one more step."""
    if state and is_due(state):
        state["gap"] = state["since_refresh"] + 1


def claim(name: str, sharding: MatrixSharding, state: State, settings: AdaRankGradConfig) -> Claim:
    """The claim of a matrix distributed by `sharding` on a `state_budget`."""
    smallest, largest = settings.rank_bounds(min(sharding.basis.size, sharding.moment.size))
    stored = sharding.stored()
    rows = sum(row_count(each) for key in OF_EACH_DIRECTION for each in stored[key])
    return Claim(
        name=name,
        smallest=smallest,
        largest=largest,
        rank=state.get("rank", 0),
        direction_bytes=rows * NUMBER_BYTES[settings.state_dtype],
        elements=sharding.moment.size * sharding.basis.size,
        energy=settings.energy,
        spectrum=state.get("spectrum"),
        is_due=is_due(state),
    )


class AdamStep(NamedTuple):
    """Numbers of a step of Adam.

    Attributes:
        number: t, starting at 1.
        betas: decay of the first and the second moments.
        eps: added to the root of the second moments.
    """

    number: int
    betas: tuple[float, float]
    eps: float


def next_step(state: State, settings: AdaRankGradConfig) -> AdamStep:
    """Count the step that begins, of the matrix or tensor with this state."""
    state["step"] += 1
    return AdamStep(state["step"], settings.betas, settings.eps)


def _directions(
    gradients: Sequence[Tensor],
    states: Sequence[State],
    *,
    adam: AdamStep,
    precision: Precision,
) -> list[Tensor]:
    """Of tensors of any shapes, the directions N."""
    directions = [torch.zeros_like(gradient) for gradient in gradients]
    if gradients[0].dtype == torch.float64 or precision == "fp32":
        advance_moments(directions, gradients, states, adam, precision)
        return directions
    for direction, gradient, state in zip(directions, gradients, states, strict=True):
        for start in range(0, len(gradient), compact.PIECE):  # no moments of a whole table in fp32
            span = slice(start, min(start + compact.PIECE, len(gradient)))
            part = compact.piece_of(state, span)
            advance_moments([direction[span]], [gradient[span]], [part], adam, precision)
            compact.put_piece(state, part, span)
    return directions


def advance_moments(
    directions: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
    adam: AdamStep,
    precision: Precision,
) -> None:
    """:func:`adam_directions`, of moments that are kept in a precision."""
    M, V = ([read(state, key) for state in states] for key in ("exp_avg", "exp_avg_sq"))
    adam_directions(directions, gradients, M, V, adam)
    for state, exp_avg, exp_avg_sq in zip(states, M, V, strict=True):
        keep(state, "exp_avg", exp_avg, precision, step=adam.number)
        keep(state, "exp_avg_sq", exp_avg_sq, precision, step=adam.number)


def adam_directions(
    directions: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    adam: AdamStep,
) -> None:
    """Update the moments and fill in the directions ``N``, all in place, by torch's fused kernel.

    Block 3 of arXiv 2410.17881, algorithm 3 (Kingma and Ba 2015, algorithm 1)::

        M <- b1 M + (1 - b1) P ;  V <- b2 V + (1 - b2) P*P
        N = M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps)

    Args:
        directions: zeros, contiguous; each list has tensors of the same shapes and of one type.
        gradients: the projected gradients P, ``moment x rank``, or any gradients.
        exp_avgs: first moments M.
        exp_avg_sqs: second moments V.
        adam: the step.
    """
    if directions[0].device.type not in FUSED_ON:
        for tensors in zip(directions, gradients, exp_avgs, exp_avg_sqs, strict=True):
            _adam_direction(*tensors, adam)
        return
    lists = [list(each) for each in (directions, gradients, exp_avgs, exp_avg_sqs)]
    lists[1] = [gradient.contiguous() for gradient in lists[1]]
    ends = _in_whole_vectors(lists) if in_host_memory(lists[0][0]) else []
    number = torch.full((), adam.number, dtype=torch.float32, device=lists[0][0].device)
    # a weight of zero that moves by -1 N, without decay, is N
    _fused_adamw()(
        *lists,
        [],
        [number] * len(lists[0]),
        lr=-1.0,
        beta1=adam.betas[0],
        beta2=adam.betas[1],
        weight_decay=0.0,
        eps=adam.eps,
        amsgrad=False,
        maximize=False,
    )
    for end, padded in ends:
        end.copy_(padded[: len(end)])


FUSED_ON = ("cpu", "cuda", "meta", "mps", "xpu")
"""Devices for which torch has the fused kernel."""


def _adam_direction(
    direction: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    adam: AdamStep,
) -> None:
    """:func:`adam_directions` of one tensor, operator by operator."""
    beta1, beta2 = adam.betas
    # M = b1 M + (1 - b1) P ;  V = b2 V + (1 - b2) P*P
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    # N = M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps), in as few passes over memory as possible
    correction1, correction2 = (1 - beta**adam.number for beta in adam.betas)
    root = exp_avg_sq.sqrt().mul_(correction1 / math.sqrt(correction2))
    root.add_(adam.eps * correction1)
    torch.div(exp_avg, root, out=direction)


@cache
def _fused_adamw() -> Callable[..., None]:
    return FUSED_ADAMW.of(torch)  # type: ignore[no-any-return]


VECTOR = 16
"""A multiple of the elements that a CPU's fused kernel takes at a time. It rounds those that are
left at the end of a tensor in another way, so that where a matrix is cut would be seen."""


def _in_whole_vectors(lists: list[list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Cut what is left at the ends of tensors from the lists, and add it padded.

    Returns:
        Each end, and the padded copy that takes its place; not of gradients.
    """
    ends = []
    for position in range(len(lists[0])):
        left = lists[0][position].numel() % VECTOR
        if left == 0:
            continue
        for place, tensors in enumerate(lists):
            flat = tensors[position].view(-1)
            tensors[position], end = flat[: len(flat) - left], flat[len(flat) - left :]
            padded = end.new_zeros(VECTOR)
            padded[:left] = end
            tensors.append(padded)
            if place != 1:
                ends.append((end, padded))
    return ends


def refresh_early(state: State, settings: AdaRankGradConfig, facts: StepFacts) -> None:
    """Schedule an early refresh if the last step's projected gradient has decayed."""
    since = state["since_refresh"]
    if since == 1:
        state["kept_sq_at_refresh"] = facts.kept_sq
    if exit_early(
        since_refresh=since,
        shortest=settings.min_gap,
        kept_sq=facts.kept_sq,
        kept_sq_at_refresh=state["kept_sq_at_refresh"],
        refresh_below=settings.refresh_below,
    ):
        # within min_gap steps, all refresh before the first may refresh early again
        steps = settings.min_gap if facts.stagger is None else min(facts.stagger, settings.min_gap)
        state["gap"] = gap_after_decay(
            state["gap"], since_refresh=since, spread=steps, phase=facts.phase
        )


def refresh(
    gradient: Part,
    device: torch.device,
    state: State,
    sharding: MatrixSharding,
    settings: AdaRankGradConfig,
    facts: StepFacts,
    choose: Choose,
    norm_sq: Tensor | None = None,
) -> Steps[NewBasis]:
    """Sketch -> ordered directions -> rank -> basis, and its rotation from the old basis.

    Arguments as of :func:`low_rank_step`; `norm_sq` is ``||G||_F^2`` where `facts` has a limit.
    """
    me, basis = sharding.me, sharding.basis
    bounds = settings.rank_bounds(min(basis.size, sharding.moment.size))
    width = sketch_width(sharding, settings)
    omega = random_signs(
        sharding.moment.touch[me],
        width,
        seed=settings.seed,
        name=facts.name,
        refresh=state.get("refreshes", 0),
        device=device,
    )
    passes, probes = settings.power_passes, None
    if norm_sq is None and sharding.terms is not None:
        probes = random_signs(
            sharding.at_home(basis.size)[me],
            PROBES,
            seed=settings.seed,
            name=f"probes of {facts.name}",
            refresh=state.get("refreshes", 0),
            device=device,
        )
    found = yield from leading_directions(
        gradient, omega, sharding, power_passes=passes, probes=probes
    )
    known = [each for each in (norm_sq, found.norm_sq) if each is not None]
    whole_sq = known[0] if known else facts.norm_sq
    choice = choose(found.energies, whole_sq, bounds, state.get("rank"), settings, facts)
    rank = choice.rank
    vectors = yield from from_home(found.vectors[:, :rank], basis.size, basis.touch, sharding)
    rotation = None
    if state:
        # R = Q_new^T Q_old, with each row of the bases counted once
        old = select_rows(read(state, "basis"), sharding.store[me], basis.keep[me])
        part = select_rows(vectors, basis.touch[me], basis.keep[me]).T @ old
        whole, shares = sharding.whole(rank), sharding.shares(rank)
        rotation = yield from relayed_sum(part, whole, shares, whole, me)
    energies = found.energies[:rank].to(device, non_blocking=True)
    return NewBasis(vectors, energies, rotation, choice)


def sketch_width(sharding: MatrixSharding, settings: AdaRankGradConfig) -> int:
    """Columns of a refresh's sketch."""
    short = min(sharding.basis.size, sharding.moment.size)
    return min(settings.rank_bounds(short)[1] + settings.oversample, short)


def adopt(
    new: NewBasis,
    projected: Tensor,
    state: State,
    sharding: MatrixSharding,
    settings: AdaRankGradConfig,
    phase: float,
) -> None:
    """Store a new basis and the transported moments in `state`."""
    if new.rotation is None:
        state.update(
            step=0,
            refreshes=0,
            kept_sq_at_refresh=0.0,
        )
        moments = torch.zeros_like(projected), torch.zeros_like(projected)
    else:
        moments = transport_moments(
            read(state, "exp_avg"),
            read(state, "exp_avg_sq"),
            new.rotation,
            projected,
            new.energies,
            rule=settings.transport,
            step=state["step"],
            betas=settings.betas,
        )
    # in fp32: the step that follows keeps them
    keep(state, "exp_avg", moments[0], "fp32")
    keep(state, "exp_avg_sq", moments[1], "fp32")
    state["gap"] = gap_until_next(
        state["refreshes"],
        first=settings.gap_to_second,
        longest=settings.max_gap,
        phase=phase,
    )
    state["refreshes"] += 1
    state["since_refresh"] = 0
    state["rank"] = projected.shape[1]
    state["energy"] = new.choice.energy
    state.pop("spectrum", None)
    if new.choice.spectrum is not None:
        state["spectrum"] = new.choice.spectrum
    # copy: a slice would keep the whole basis or bucket alive
    stored = select_rows(
        new.vectors, sharding.basis.touch[sharding.me], sharding.store[sharding.me]
    ).clone(memory_format=torch.contiguous_format)
    keep(state, "basis", stored, settings.state_dtype)
