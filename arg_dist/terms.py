"""AdaRankGrad on a gradient that is a mean of terms, one on each process, and never formed whole.

Projecting is linear, ``mean(G_i) Q = mean(G_i Q)``, and so is each round of a refresh: the basis,
its rank and Adam's moments are those of the mean, from products of few columns. The residual
``S_i = G_i - G_i Q Q^T`` of each term goes in few bits an element
(:mod:`arg_dist.subspace.codes`) to where their mean is formed, and what follows from it comes back
in few bits:

============== =========================== =====================================================
rule           the mean is formed          what comes back
============== =========================== =====================================================
orthogonalized at the home process         the polar factor O: rounded after it was taken, which
                                           would raise what rounding adds to weak directions
matched        an even share by everyone   the mean; with one bit the sign of the majority, or
                                           one that is tossed
============== =========================== =====================================================

With one bit a term sends its signs, and none if it is zero: it has no vote.
What rounding takes away is not kept for later: a process has no state of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from arg_dist.algorithm import (
    TYPES,
    Choose,
    LowRankUpdate,
    NewBasis,
    StepFacts,
    blended_momentum,
    chosen_by_energy,
    is_due,
    present_basis,
    refresh,
    sent_term,
    sent_type,
    sketch_width,
    step_in_basis,
    summed,
)
from arg_dist.config import AdaRankGradConfig
from arg_dist.subspace.codes import BLOCK, Coded, blocks_of, decode, encode
from arg_dist.subspace.distributed import (
    Exchange,
    Interval,
    MatrixSharding,
    Rows,
    Steps,
    gather,
    gather_each,
    select_rows,
    sum_scatter,
)
from arg_dist.subspace.norms import norm_sq, row_squares
from arg_dist.subspace.precision import lowered_precision
from arg_dist.subspace.range_finder import Part
from arg_dist.subspace.residual import matched_factors, orthogonalize, residual_part
from arg_dist.subspace.state import State


def step_of_terms(
    gradient: Part,
    device: torch.device,
    state: State,
    sharding: MatrixSharding,
    settings: AdaRankGradConfig,
    facts: StepFacts,
    *,
    choose: Choose = chosen_by_energy,
) -> Steps[LowRankUpdate | None]:
    """One step of AdaRankGrad on one matrix; `state` is updated in place.

    Args:
        gradient: ``moment x basis``, this process's term: its gradient over their number.
        device: its device.
        state: the matrix's state; empty before its first step.
        sharding: how the matrix is distributed over the processes, with `terms`.
        settings: the settings of its parameter group.
        facts: what is known of the matrix; equal on all processes.
        choose: as of :func:`arg_dist.algorithm.low_rank_step`.

    Returns:
        The update, or None if all terms have been zero since the start.
    """
    assert sharding.terms is not None
    me, moment, alone = sharding.me, sharding.moment, sharding.terms.alone
    limit = float(facts.norm_sq)
    new = mean = None
    if limit > 0 and is_due(state):
        if sends_whole(sharding, settings):
            mean = yield from formed_mean(gradient(), sharding)
            gradient = partial(_itself, mean)
            new = yield from _refresh_of_mean(mean, state, sharding, settings, facts, choose)
        else:
            new = yield from refresh(gradient, device, state, sharding, settings, facts, choose)
        basis = new.vectors
    elif state:
        basis = yield from present_basis(state, sharding)
    else:
        return None
    # P_i = G_i Q ;  S_i = G_i - P_i Q^T
    residual = None
    with lowered_precision(settings.matmul_precision):
        product = gradient() @ basis
        if settings.residual != "none":
            residual = residual_part(gradient(), product, basis, limit, alone)
    share = None
    if mean is not None:  # everyone has all of P and S
        projected = select_rows(product, moment.touch[me], moment.keep[me]).contiguous()
        if residual is not None:
            share = residual[slice(*decided_elements(sharding, settings))]
    else:
        codes = () if residual is None else coded_term(residual, sharding, settings)
        residual = None  # it need not wait for the others
        # P = sum_i P_i
        total, *terms = yield (sent_term(product, moment, settings), *codes)
        projected = summed(total, product.dtype)
        if codes:
            share = mean_of(terms, sharding, settings)
    direction, _ = step_in_basis(new, projected, state, sharding, settings, facts)
    if settings.residual == "orthogonalized":
        share = yield from _orthogonalized(share, basis, limit, state, sharding, settings)
    sent = direction.to(sent_type(direction.dtype, settings))
    parts = [(sent, moment.keep, moment.update)]
    if share is not None:
        text = f"{settings.seed}|{facts.name}|{state['step']}"
        parts += decided_parts(share, text, sharding, settings)
    sent, *decided = yield from gather_each(parts, me)
    direction = sent.to(direction.dtype)
    if not decided:
        return LowRankUpdate(direction, basis)
    outside = decode(as_coded(decided), sharding.elements.size)
    if settings.residual == "matched":
        outside = _matched(outside, direction, alone)
    return LowRankUpdate(direction, basis, outside=outside)


def sends_whole(sharding: MatrixSharding, settings: AdaRankGradConfig) -> bool:
    """Whether a refresh sends less by forming the mean of the gradients than by sketching it."""
    m, n = sharding.moment.size, sharding.basis.size
    return m * n <= (1 + settings.power_passes) * (m + n) * sketch_width(sharding, settings)


def formed_mean(term: Tensor, sharding: MatrixSharding) -> Steps[Tensor]:
    """``moment x basis``: the sum of all terms, equal on all processes."""
    moment, me = sharding.moment, sharding.me
    rows = yield from sum_scatter(term, moment.touch, moment.keep, me)
    return (yield from gather(rows, moment.keep, moment.touch, me))


def _itself(mean: Tensor) -> Tensor:
    return mean


def _refresh_of_mean(
    mean: Tensor,
    state: State,
    sharding: MatrixSharding,
    settings: AdaRankGradConfig,
    facts: StepFacts,
    choose: Choose,
) -> Steps[NewBasis]:
    """:func:`arg_dist.algorithm.refresh` with a mean that every process has."""
    assert sharding.terms is not None
    moment, me = sharding.moment, sharding.me
    rows = partial(select_rows, mean, moment.touch[me], moment.keep[me])
    averaged = sharding.terms.averaged
    return (
        yield from refresh(
            rows, mean.device, state, averaged, settings, facts, choose, norm_sq(mean)
        )
    )


def _orthogonalized(
    residual: Tensor | None,
    basis: Tensor,
    limit: float,
    state: State,
    sharding: MatrixSharding,
    settings: AdaRankGradConfig,
) -> Steps[Tensor]:
    """``elements`` at home, none elsewhere: what the residual adds to the update.

    Args:
        residual: ``elements`` at home, ``S / ||G||``, with `limit` for ``||G||^2``.
        basis: ``basis x rank``, Q.
        limit: at least ``||G||^2``.
        state: the matrix's state; the momentum of the residual is updated.
        sharding: how the matrix is distributed over the processes.
        settings: the settings of its parameter group.
    """
    assert residual is not None and sharding.terms is not None
    blend = None
    if settings.remembers_residual:
        blend = blended_momentum(state, limit**0.5, basis.device, sharding, settings)
    if sharding.me != sharding.home:
        return residual
    typed, alone = residual.to(TYPES[settings.polar_precision]), sharding.terms.alone
    steps = settings.polar_steps
    return (yield from orthogonalize(typed, basis, alone, steps=steps, blend=blend)).float()


def _matched(residual: Tensor, direction: Tensor, alone: MatrixSharding) -> Tensor:
    """``elements``: the residual with rows as long as `matched` makes them.

    Args:
        residual: ``elements``, S up to a factor for each row; overwritten.
        direction: ``moment x rank``, N.
        alone: the sharding of a matrix that this process holds whole.
    """
    S, inside = alone.matrix(residual), direction.new_zeros(alone.moment.size)
    # phi_i ||S_i|| = ||N_i|| sqrt((n - r) / r)
    S *= matched_factors(direction, inside, row_squares(S), dimension=alone.basis.size)[:, None]
    return residual


# -- residuals in few bits ------------------------------------------------------------------------


def decided_blocks(sharding: MatrixSharding, settings: AdaRankGradConfig) -> Rows:
    """Blocks of elements of which each process forms the mean.

    All are at home if the residual is orthogonalized there, else everyone has an even share.
    """
    blocks = blocks_of(sharding.elements.size)
    at_home = settings.residual == "orthogonalized"
    return sharding.at_home(blocks) if at_home else sharding.shares(blocks)


def decided_elements(sharding: MatrixSharding, settings: AdaRankGradConfig) -> Interval:
    """The elements of which this process forms the mean: whole blocks, but for the last."""
    low, high = decided_blocks(sharding, settings)[sharding.me]
    size = sharding.elements.size
    return min(size, low * BLOCK), min(size, high * BLOCK)


def coded_term(
    residual: Tensor, sharding: MatrixSharding, settings: AdaRankGradConfig
) -> tuple[Exchange, Exchange]:
    """This process's term, for the processes that form the mean.

    Args:
        residual: ``elements``, S_i; overwritten.
        sharding: how the matrix is distributed over the processes.
        settings: the settings of its parameter group.
    """
    have, want = sharding.whole(blocks_of(len(residual))), decided_blocks(sharding, settings)
    size, one = residual.norm().view(1), sharding.whole(1)
    coded = encode(residual, settings.residual_sync_bits)
    codes = Exchange(coded.codes, have, want, stacked=True)
    if coded.bits == 1:  # signs tell no size, and a term of size zero has no vote
        return codes, Exchange(size, one, one, stacked=True)
    return codes, Exchange(coded.scales, have, want, stacked=True)


def mean_of(
    terms: Sequence[Tensor], sharding: MatrixSharding, settings: AdaRankGradConfig
) -> Tensor:
    """:func:`decided_elements` of the sum of the terms, fp32; of signs, if these are all there is.

    Args:
        terms: of each exchange of :func:`coded_term`, what all processes sent.
        sharding: how the matrix is distributed over the processes.
        settings: the settings of its parameter group.
    """
    (codes, sizes), (low, high) = terms, decided_elements(sharding, settings)
    total = codes.new_zeros(high - low, dtype=torch.float32)
    if settings.residual_sync_bits > 1:
        for each in zip(codes, sizes, strict=True):
            total += decode(Coded(*each), high - low)
        return total
    for signs, size in zip(codes, sizes if len(codes) else (), strict=True):
        total += decode(as_coded([signs]), high - low).mul_(2 * (size > 0))
    # votes of one size, that of the terms on average
    return total.mul_(sizes.mean() / sharding.elements.size**0.5)


def decided_parts(
    share: Tensor, text: str, sharding: MatrixSharding, settings: AdaRankGradConfig
) -> list[tuple[Tensor, Rows, Rows]]:
    """What this process has decided, for all: parts of :func:`gather_each`.

    Args:
        share: ``elements`` that it decides on; overwritten.
        text: draws the signs of zeros, which no code has.
        sharding: how the matrix is distributed over the processes.
        settings: the settings of its parameter group.
    """
    blocks = blocks_of(sharding.elements.size)
    rows = decided_blocks(sharding, settings), sharding.whole(blocks)
    elements = decided_elements(sharding, settings)
    coin = tossed(text, elements, share.device).mul_(torch.finfo(torch.float32).tiny)
    coded = encode(torch.where(share == 0, coin, share), settings.residual_back_bits)
    return [(part, *rows) for part in (coded if coded.bits > 1 else coded[:1])]


def as_coded(parts: Sequence[Tensor]) -> Coded:
    """Codes with their scales; signs, which have none, are plus and minus one half."""
    codes, *scales = parts
    return Coded(codes, scales[0] if scales else codes.new_ones(len(codes), dtype=torch.bfloat16))


def tossed(text: str, elements: Interval, device: torch.device) -> Tensor:
    """1 or -1 for each element, as drawn by `text`; whichever process draws them, fp32."""
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
    # a counter, mixed as in splitmix64
    number = torch.arange(*elements, dtype=torch.int64, device=device)
    number = (number ^ key) * -7046029254386353131
    number = (number ^ number >> 30) * -4658895280553007687
    return (number ^ number >> 27).bitwise_and_(1).mul_(2).sub_(1).float()
