"""The residual: the part of the gradient outside the basis, added to the update without moments.

Adam's direction N is the step for the projected gradient P. The residual ``S = G - P Q^T`` is added
by one of three rules; the last two scale its rows, ``phi_i S_i``:

============== ============================================== ==================================
orthogonalized ``sqrt(max(m, n)) O``: the polar factor O of   the default; orthogonalization as in
               S with equal rows, so that all directions      Muon, of what Adam's basis leaves
               outside move by one size, that of Adam's
               updates
scaled         ``phi_i = ||N_i|| / ||P_i||``: in proportion   Fira, arXiv 2410.01623, 4.1, 4.2
               to the row's step inside the basis; a limiter
               prevents jumps of the norm
matched        ``phi_i ||S_i|| = ||N_i|| sqrt((n - r) / r)``:
               each of the n - r directions outside moves as
               far as one of the r inside does on average
============== ============================================== ==================================

Under full-rank Adam, all entries of an update have about the same size, along strong and weak
directions alike. `matched` preserves this: the size of the update is independent of the rank, and
so is the best learning rate. Under `scaled`, weak directions stay as weak as in the gradient. On
noisy gradients N is well below one, and so is what `matched` adds; an orthogonalized residual bears
the full size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from arg_dist.subspace.exchange import Steps, gather_each, select_rows, sum_scatter
from arg_dist.subspace.norms import row_squares
from arg_dist.subspace.polar import polar_factor, with_equal_rows
from arg_dist.subspace.spread import Spread

Rule = Literal["none", "scaled", "matched", "orthogonalized"]

SCALES_ROWS = ("scaled", "matched")
"""The rules that add ``phi_i S_i``, for which the rows' norms are exchanged."""

FAINT = 1e-4
"""Share of a row's ||G_i||^2 below which its residual fades out, being mostly rounding error."""


def scaled_factors(direction: Tensor, projected_sq: Tensor) -> Tensor:
    """``rows``: phi of the rule `scaled`, from N, ``rows x rank``, and ``||P_i||^2``, ``rows``."""
    # phi_i = ||N_i|| / ||P_i||
    factors = (row_squares(direction) / projected_sq).sqrt_()
    return torch.where(projected_sq > 0, factors, 0.0)


def matched_factors(
    direction: Tensor, projected_sq: Tensor, row_sq: Tensor, *, dimension: int
) -> Tensor:
    """``rows``: phi of the rule `matched`.

    Args:
        direction: ``rows x rank``, N.
        projected_sq: ``rows``, ``||P_i||^2``.
        row_sq: ``rows``, ``||G_i||^2``.
        dimension: n, the total number of directions; the basis spans `rank` of them.
    """
    rank = direction.shape[1]
    # phi_i = ||N_i|| sqrt((n - r) / r) / ||S_i||
    reach = row_squares(direction) * ((dimension - rank) / rank)
    factors = (reach / (outside_sq(projected_sq, row_sq) + FAINT * row_sq)).sqrt_()
    return torch.where(row_sq > 0, factors, 0.0)


def outside_sq(projected_sq: Tensor, row_sq: Tensor) -> Tensor:
    """``rows``: ``||S_i||^2 = ||G_i||^2 - ||P_i||^2``, as Q is orthonormal."""
    return (row_sq - projected_sq).clamp_min_(0)


def limit_growth(
    factors: Tensor,
    projected_sq: Tensor,
    row_sq: Tensor,
    norm_before: Tensor | None,
    spread: Spread,
    *,
    growth: float,
) -> Steps[tuple[Tensor, Tensor]]:
    """Reduce the factors if the norm of the scaled residual has grown by more than `growth`.

    Args:
        factors: ``moment.keep``, phi.
        projected_sq: ``moment.keep``, ``||P_i||^2``.
        row_sq: ``moment.keep``, ``||G_i||^2``.
        norm_before: the norm returned by the previous step, fp64; None at the first step.
        spread: how the matrix is distributed over the processes.
        growth: largest growth of the norm in one step.

    Returns:
        ``moment.keep``, the factors; and the norm of the residual they give, an fp64 scalar.
    """
    # ||phi S||^2 = sum_i phi_i^2 ||S_i||^2
    part = (factors.square() * outside_sq(projected_sq, row_sq)).sum(dtype=torch.float64).view(1)
    all_owners = spread.whole(1)
    norm = (yield from sum_scatter(part, all_owners, all_owners, spread.me)).sqrt().view(())
    if norm_before is None:
        return factors, norm
    # S <- S min(1, growth ||S_before|| / ||S||)
    limited = torch.minimum(norm, growth * norm_before)
    return factors * torch.where(norm > 0, limited / norm, 1.0).float(), limited


def residual_part(
    gradient: Tensor, projected: Tensor, basis: Tensor, norm_sq: float, spread: Spread
) -> Tensor:
    """``elements.touch``: ``S / ||G||`` of this process's elements, fp32.

    Args:
        gradient: ``moment.touch x basis.touch``, this process's part of G, fp32.
        projected: ``moment.touch x rank``, P.
        basis: ``basis.touch x rank``, Q.
        norm_sq: ``||G||_F^2`` over all processes.
        spread: how the matrix is distributed over the processes.
    """
    # S = G - P Q^T
    share = norm_sq**-0.5 if norm_sq > 0 else 0.0
    part: Tensor = torch.addmm(gradient, projected, basis.T, beta=share, alpha=-share)
    return spread.flat(part)


def orthogonalize(
    part: Tensor,
    basis: Tensor,
    spread: Spread,
    *,
    steps: int,
    blend: Callable[[Tensor], None] | None = None,
) -> Steps[Tensor]:
    """``elements`` at home, none elsewhere: ``sqrt(max(m, n)) O`` in the type of the part.

    Args:
        part: ``elements.keep``, S of this process's elements; overwritten.
        basis: ``basis.touch x rank``, Q.
        spread: how the matrix is distributed over the processes.
        steps: Newton-Schulz iterations.
        blend: replaces S, ``moment x basis``, by one that remembers those before; in place.
    """
    elements, (m, n) = spread.elements, (spread.moment.size, spread.basis.size)
    kept = select_rows(basis, spread.basis.touch[spread.me], spread.basis.keep[spread.me])
    parts = (
        (part, elements.keep, spread.at_home(elements.size)),
        (kept.to(part.dtype), spread.basis.keep, spread.at_home(n)),
    )
    del part
    whole, Q = yield from gather_each(parts, spread.me)
    del parts
    if spread.me != spread.home:
        return whole
    S = spread.matrix(whole)
    del whole  # or it would be held beside what Newton-Schulz makes of it
    if blend is not None:
        blend(S)
    # once more S - S Q Q^T: what is left of Q by rounding would be as large as the rest of O
    S.addmm_(S @ Q, Q.T, alpha=-1)
    # each row of W in S, divided by its rms
    with_equal_rows(S if spread.outputs_are_moment else S.T)
    waiting = [S]
    del S
    # rms(O) = 1 / sqrt(max(m, n))
    factor = polar_factor(waiting.pop(), steps).mul_(max(m, n) ** 0.5)
    ordered: Tensor = (factor if spread.cuts_moment else factor.T).contiguous()
    return ordered.view(-1)
