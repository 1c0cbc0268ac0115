"""AdaRankGrad on a gradient that is a mean of terms, one on each process, and never formed whole.

Or one in each copy of a model that is sharded itself, of which a process has a part.

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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from arg_dist.algorithm import (
    Choose,
    LowRankUpdate,
    NewBasis,
    StepFacts,
    at_full_size,
    at_hand,
    chosen_by_energy,
    is_due,
    present_basis,
    projection,
    refresh,
    sent_term,
    sent_type,
    sketch_width,
    step_in_basis,
    stored_basis,
    summed,
)
from arg_dist.config import AdaRankGradConfig
from arg_dist.subspace.codes import BLOCK, Coded, blocks_of, coded_bytes, decode, encode
from arg_dist.subspace.distributed import (
    FP32_BYTES,
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
from arg_dist.subspace.products import lowered_precision
from arg_dist.subspace.range_finder import Part
from arg_dist.subspace.residual import matched_factors, residual_of
from arg_dist.subspace.sketch import hashed
from arg_dist.subspace.state import State


class Term(NamedTuple):
    """What a process has to send of its gradient in a step without a refresh.

    Attributes:
        projected: ``moment.touch x rank``, P_i, or what a part of G_i adds to it.
        residual: ``elements.touch``, S_i in `residual_sync_bits` each; None if it is dropped.
        size: ``1``, ``||S_i||``; None without a residual.
    """

    projected: Tensor
    residual: Coded | None = None
    size: Tensor | None = None

    def scale_(self, factor: float) -> None:
        """Multiply the gradient by a number, in place."""
        for part in (self.projected, self.residual and self.residual.scales, self.size):
            if part is not None:
                part.mul_(factor)


def own_term(
    gradient: Part,
    basis: Tensor,
    sharding: MatrixSharding,
    settings: AdaRankGradConfig,
    before: Term | None = None,
) -> Steps[Term]:
    """This process's term, or a micro-batch's added to it; asks for nothing if it has all of G_i.

    Args:
        gradient: ``moment.touch x basis.touch``, this process's part of G_i over their number.
        basis: ``basis.touch x rank``, Q.
        sharding: how the matrix is distributed over the processes, with `terms`.
        settings: the settings of its parameter group.
        before: the term of the micro-batches before this one, which is used up. With a residual,
            each further one rounds the sum once more.
    """
    moment, terms = sharding.moment, sharding.terms
    assert terms is not None
    # P_i = G_i Q
    product = yield from projection(gradient, basis, sharding, settings)
    residual = size = None
    if settings.residual != "none":
        own = product
        if terms.averaged is None:  # of all parts of G_i
            rows = terms.within_copies(moment.touch, moment.size)
            own = yield from sum_scatter(product, rows, rows, sharding.me)
        # S_i = G_i - P_i Q^T
        with lowered_precision(settings.matmul_precision):
            S = sharding.flat(residual_of(gradient(), own, basis, 1.0))
        if before is not None and before.residual is not None:
            S.add_(decode(before.residual, len(S)))
        size = S.norm().view(1)
        residual = encode(S, settings.residual_sync_bits)
    if before is not None:
        product.add_(before.projected)
    return Term(product, residual, size)


def term_bytes(sharding: MatrixSharding, rank: int, settings: AdaRankGradConfig) -> int:
    """Bytes of a term of a process that has all of its gradient."""
    inside = FP32_BYTES * sharding.moment.size * rank
    if settings.residual == "none":
        return inside
    return inside + coded_bytes(sharding.elements.size, settings.residual_sync_bits) + FP32_BYTES


@dataclass(frozen=True)
class Projected:
    """The gradients of one or more micro-batches, projected one by one and freed.

    Attributes:
        term: the sum of their terms.
        norm_sq: limit for ``||G_i||^2`` of their sum, over the number of processes, fp64.
        micro_batches: number of them.
        basis: the basis that they were projected to, as it is in the matrix's state.
        sketch: ``BUCKETS``, fp64, of their sum (:mod:`arg_dist.subspace.norm_sketch`), if its norm
            is wanted.
    """

    term: Term
    norm_sq: Tensor
    micro_batches: int
    basis: Tensor
    sketch: Tensor | None = None

    def fits(self, state: State) -> bool:
        """Whether a step on this state of the matrix can use them."""
        return stored_basis(state) is self.basis and not is_due(state)


def step_of_terms(
    gradient: Part,
    device: torch.device,
    state: State,
    sharding: MatrixSharding,
    settings: AdaRankGradConfig,
    facts: StepFacts,
    *,
    term: Term | None = None,
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
        term: the term in the present basis, if the gradient itself is gone; not in a step that
            refreshes.
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
            mean = yield from formed_mean(gradient().float(), sharding)
            gradient = at_hand(mean)
            new = yield from _refresh_of_mean(mean, state, sharding, settings, facts, choose)
        else:
            exact = None
            if is_small(sharding, settings):
                exact = yield from norm_of_mean(gradient().float(), sharding)
            new = yield from refresh(
                gradient, device, state, sharding, settings, facts, choose, exact
            )
        basis = new.vectors
    elif state:
        basis = yield from present_basis(state, sharding)
    else:
        return None
    share = None
    if mean is not None:  # everyone has all of P and S
        with lowered_precision(settings.matmul_precision):
            product = mean @ basis
            if settings.residual != "none":
                residual = alone.flat(residual_of(mean, product, basis, limit))
                share = residual[slice(*decided_elements(sharding, settings))]
                del residual
        projected = select_rows(product, moment.touch[me], moment.keep[me]).contiguous()
    else:
        if term is None:
            term = yield from own_term(gradient, basis, sharding, settings)
        # P = sum_i P_i
        codes = sent_residual(term, sharding, settings)
        total, *terms = yield (sent_term(term.projected, moment, settings), *codes)
        projected = summed(total, term.projected.dtype)
        if terms:
            share = mean_of(terms, sharding, settings).mul_(limit**-0.5 if limit > 0 else 0.0)
    direction, *_ = yield from step_in_basis(new, projected, state, sharding, settings, facts)
    if settings.residual == "orthogonalized":
        share = yield from _orthogonalized(share, basis, limit, state, sharding, settings)
    if sharding.terms.count == 1:  # nothing is sent, and nothing rounded for it
        return LowRankUpdate(direction, basis, outside=_sized(share, direction, alone, settings))
    sent = direction.to(sent_type(direction.dtype, settings))
    parts = [(sent, moment.keep, moment.update)]
    if share is not None:
        text = f"{settings.seed}|{facts.name}|{state['step']}"
        parts += decided_parts(share, text, sharding, settings)
    sent, *decided = yield from gather_each(parts, me)
    direction = sent.to(direction.dtype)
    outside = _decoded(decided, sharding) if decided else None
    return LowRankUpdate(direction, basis, outside=_sized(outside, direction, alone, settings))


def is_small(sharding: MatrixSharding, settings: AdaRankGradConfig) -> bool:
    """Whether forming the mean of the gradients sends less than sketching it."""
    m, n = sharding.moment.size, sharding.basis.size
    return m * n <= (1 + settings.power_passes) * (m + n) * sketch_width(sharding, settings)


def sends_whole(sharding: MatrixSharding, settings: AdaRankGradConfig) -> bool:
    """Whether a refresh forms the mean of the gradients, on every process."""
    has_whole = sharding.terms is not None and sharding.terms.averaged is not None
    return has_whole and is_small(sharding, settings)


def norm_of_mean(part: Tensor, sharding: MatrixSharding) -> Steps[Tensor]:
    """``||G||_F^2`` of the mean of gradients, an fp64 scalar, equal on all owners.

    Args:
        part: ``moment.touch x basis.touch``, this process's part of its term.
        sharding: how the matrix is distributed over the processes.
    """
    elements, everyone, me = sharding.elements, sharding.whole(1), sharding.me
    mean = yield from sum_scatter(sharding.flat(part), elements.touch, elements.keep, me)
    square = mean.square().sum(dtype=torch.float64).view(1)
    return (yield from sum_scatter(square, everyone, everyone, me)).view(())


def formed_mean(term: Tensor, sharding: MatrixSharding) -> Steps[Tensor]:
    """``moment x basis``: the sum of all terms, equal on all processes."""
    moment, me = sharding.moment, sharding.me
    rows = yield from sum_scatter(term, moment.touch, moment.keep, me)
    return (yield from gather(rows, moment.keep, moment.touch, me))


def _refresh_of_mean(
    mean: Tensor,
    state: State,
    sharding: MatrixSharding,
    settings: AdaRankGradConfig,
    facts: StepFacts,
    choose: Choose,
) -> Steps[NewBasis]:
    """:func:`arg_dist.algorithm.refresh` with a mean that every process has."""
    assert sharding.terms is not None and sharding.terms.averaged is not None
    moment, me, averaged = sharding.moment, sharding.me, sharding.terms.averaged
    rows = partial(select_rows, mean, moment.touch[me], moment.keep[me])
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
    at_home, me = sharding.decided_at_home, sharding.me
    side, rows = at_home.basis, at_home.at_home(sharding.basis.size)
    kept = select_rows(basis, side.touch[me], side.keep[me])
    Q = yield from gather(kept, side.keep, rows, me)
    S = at_home.matrix(residual) if me == at_home.home else residual
    factor = yield from at_full_size(S, Q, limit**0.5, state, at_home, settings)
    return factor.float()


def _sized(
    residual: Tensor | None, direction: Tensor, alone: MatrixSharding, settings: AdaRankGradConfig
) -> Tensor | None:
    """``elements``: what the residual adds to the update; with rows as `matched` makes them.

    Args:
        residual: ``elements``, O, or S up to a factor for each row; overwritten.
        direction: ``moment x rank``, N.
        alone: the sharding of a matrix that this process holds whole.
        settings: the settings of its parameter group.
    """
    if residual is None or settings.residual != "matched":
        return residual
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


def sent_residual(
    term: Term, sharding: MatrixSharding, settings: AdaRankGradConfig
) -> tuple[Exchange, ...]:
    """The residual of this process's term, for the processes that form the mean; () without."""
    if term.residual is None or term.size is None:
        return ()
    codes, scales = term.residual
    if settings.residual == "orthogonalized":
        have = blocks_in_turn(sharding.elements.touch)
        want, one = sharding.at_home(have[-1][1]), a_row_each(sharding.owners, sharding.processes)
        sizes = Exchange(term.size, one, sharding.at_home(sharding.processes))
        stacked = False
    else:
        have, want = sharding.whole(len(codes)), decided_blocks(sharding, settings)
        one = sharding.whole(1)
        sizes = Exchange(term.size, one, one, stacked=True)
        stacked = True
    sent = Exchange(codes, have, want, stacked)
    if term.residual.bits == 1:  # signs tell no size, and a term of size zero has no vote
        return sent, sizes
    return sent, Exchange(scales, have, want, stacked)


@lru_cache(maxsize=65536)
def a_row_each(owners: tuple[int, ...], processes: int) -> Rows:
    """A row for each process, which those without a part do not have."""
    return tuple((i, i + (i in owners)) for i in range(processes))


@lru_cache(maxsize=65536)
def blocks_in_turn(elements: Rows) -> Rows:
    """The blocks of what each process holds, one process's after another's."""
    ends = list(accumulate((blocks_of(high - low) for low, high in elements), initial=0))
    return tuple(pairwise(ends))


def mean_of(
    parts: Sequence[Tensor], sharding: MatrixSharding, settings: AdaRankGradConfig
) -> Tensor:
    """:func:`decided_elements` of the sum of the terms, fp32; of signs, if these are all there is.

    Args:
        parts: of each exchange of :func:`sent_residual`, what all processes sent.
        sharding: how the matrix is distributed over the processes.
        settings: the settings of its parameter group.
    """
    low, high = decided_elements(sharding, settings)
    total = parts[0].new_zeros(high - low, dtype=torch.float32)
    if low == high:
        return total
    votes = settings.residual_sync_bits == 1
    for start, stop, codes, size in _received(parts, sharding, settings):
        if votes:  # of one size, that of the terms on average
            total[start:stop] += decode(as_coded([codes]), stop - start).mul_(2 * size)
        else:
            total[start:stop] += decode(Coded(codes, size), stop - start)
    return total


def _received(
    parts: Sequence[Tensor], sharding: MatrixSharding, settings: AdaRankGradConfig
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Of each process the elements, codes, and scales, or the length of a vote's element."""
    codes, sizes = parts
    if settings.residual_sync_bits == 1:
        sizes = _lengths_of_votes(sizes.flatten(), sharding)
    if settings.residual != "orthogonalized":
        low, high = decided_elements(sharding, settings)
        for each, size in zip(codes, sizes, strict=True):
            yield 0, high - low, each, size
        return
    blocks = blocks_in_turn(sharding.elements.touch)
    for process, (low, high) in enumerate(sharding.elements.touch):
        rows = slice(*blocks[process])
        size = sizes[process] if settings.residual_sync_bits == 1 else sizes[rows]
        yield low, high, codes[rows], size


def _lengths_of_votes(sizes: Tensor, sharding: MatrixSharding) -> Tensor:
    """``processes``: the mean length of an element of the terms; zero for terms of size zero.

    Args:
        sizes: ``processes``, ``||S_i||`` of what each holds.
        sharding: how the matrix is distributed over the processes.
    """
    held, lengths = sharding.elements.touch, torch.zeros_like(sizes)
    for low, high in dict.fromkeys(held):
        alike = [i for i, other in enumerate(held) if other == (low, high)]
        lengths[alike] = sizes[alike].mean() / max(1, high - low) ** 0.5
    return lengths * (sizes > 0)


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
    rows = decided_blocks(sharding, settings), blocks_around(sharding.elements.update)
    elements = decided_elements(sharding, settings)
    coin = tossed(text, elements, share.device).mul_(torch.finfo(torch.float32).tiny)
    coded = encode(torch.where(share == 0, coin, share), settings.residual_back_bits)
    return [(part, *rows) for part in (coded if coded.bits > 1 else coded[:1])]


@lru_cache(maxsize=65536)
def blocks_around(elements: Rows) -> Rows:
    """The blocks in which each process's elements lie."""
    return tuple((a // BLOCK, blocks_of(b)) if a < b else (0, 0) for a, b in elements)


def _decoded(parts: Sequence[Tensor], sharding: MatrixSharding) -> Tensor:
    """``elements.update``, of the blocks around them."""
    low, high = sharding.elements.update[sharding.me]
    first = low // BLOCK * BLOCK
    return decode(as_coded(parts), high - first)[low - first :]


def as_coded(parts: Sequence[Tensor]) -> Coded:
    """Codes with their scales; signs, which have none, are plus and minus one half."""
    codes, *scales = parts
    return Coded(codes, scales[0] if scales else codes.new_ones(len(codes), dtype=torch.bfloat16))


def tossed(text: str, elements: Interval, device: torch.device) -> Tensor:
    """1 or -1 for each element, as drawn by `text`; whichever process draws them, fp32."""
    return (hashed(text, elements, device) >> 63).bitwise_or_(1).float()
