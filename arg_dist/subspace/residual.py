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

from typing import Any, Literal

import torch
from torch import Tensor

from arg_dist.subspace.distributed import (
    MatrixSharding,
    Steps,
    sum_scatter,
)
from arg_dist.subspace.norms import row_squares

Rule = Literal["none", "scaled", "matched", "orthogonalized"]

SCALES_ROWS = ("scaled", "matched")
"""The rules that add ``phi_i S_i``, for which the rows' norms are exchanged."""

FAINT = 1e-4
"""Share of a row's ||G_i||^2, or of their mean, below which the row's residual fades out, being
mostly rounding error."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Muon's a, b, c of ``a x + b x^3 + c x^5`` (https://kellerjordan.github.io/posts/muon).

Steep at zero, so that after five steps every singular value above 1 % of the norm lies near one
(between 0.7 and 1.2), and smaller ones have been multiplied by no more than 3.4445^5 = 485, which
bounds what rounding can do.
"""


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
    sharding: MatrixSharding,
    *,
    growth: float,
) -> Steps[tuple[Tensor, Tensor]]:
    """Reduce the factors if the norm of the scaled residual has grown by more than `growth`.

    Args:
        factors: ``moment.keep``, phi.
        projected_sq: ``moment.keep``, ``||P_i||^2``.
        row_sq: ``moment.keep``, ``||G_i||^2``.
        norm_before: the norm returned by the previous step, fp64; None at the first step.
        sharding: how the matrix is distributed over the processes.
        growth: largest growth of the norm in one step.

    Returns:
        ``moment.keep``, the factors; and the norm of the residual they give, an fp64 scalar.
    """
    # ||phi S||^2 = sum_i phi_i^2 ||S_i||^2
    part = (factors.square() * outside_sq(projected_sq, row_sq)).sum(dtype=torch.float64).view(1)
    all_owners = sharding.whole(1)
    norm = (yield from sum_scatter(part, all_owners, all_owners, sharding.me)).sqrt().view(())
    if norm_before is None:
        return factors, norm
    # S <- S min(1, growth ||S_before|| / ||S||)
    limited = torch.minimum(norm, growth * norm_before)
    return factors * torch.where(norm > 0, limited / norm, 1.0).float(), limited


def residual_of(
    gradient: Tensor,
    projected: Tensor,
    basis: Tensor,
    norm_sq: float,
    *,
    overwrite: bool = False,
) -> Tensor:
    """``rows x columns``: ``S / ||G||``, fp32.

    Args:
        gradient: ``rows x columns``, G or a block of it.
        projected: ``rows x rank``, P.
        basis: ``columns x rank``, Q.
        norm_sq: ``||G||_F^2``, of all of G.
        overwrite: use the memory of the gradient, which is fp32.
    """
    # S = G - P Q^T
    share = norm_sq**-0.5 if norm_sq > 0 else 0.0
    S = gradient if overwrite else gradient.to(torch.float32, copy=True)
    return S.addmm_(projected, basis.T, beta=share, alpha=-share)


def orthogonalized(
    residual: Tensor, basis: Tensor, *, outputs_are_moment: bool, steps: int
) -> Tensor:
    """``moment x basis``: ``sqrt(max(m, n)) O``, in the type of the residual; or k of them.

    Args:
        residual: ``moment x basis``, S, with a norm of at most 1, or ``k x moment x basis``;
            overwritten.
        basis: ``basis x rank``, Q, in the same type, or ``k x basis x rank``.
        outputs_are_moment: whether the moment side is that of the rows of W in the model.
        steps: Newton-Schulz iterations.
    """
    # once more S - S Q Q^T: what is left of Q by rounding would be as large as the rest of O
    add_product(residual, residual @ basis, basis.mT, alpha=-1, out=residual)
    # each row of W in S, divided by its rms
    with_equal_rows(residual if outputs_are_moment else residual.mT)
    # rms(O) = 1 / sqrt(max(m, n))
    return polar_factor(residual, steps).mul_(max(residual.shape[-2:]) ** 0.5)


def add_product(total: Tensor, left: Tensor, right: Tensor, **options: Any) -> Tensor:
    """``beta total + alpha left right``, of a matrix each or of k."""
    function = torch.addmm if total.ndim == 2 else torch.baddbmm
    return function(total, left, right, **options)


def polar_factor(matrix: Tensor, steps: int) -> Tensor:
    """``m x n``: ``O = U V^T`` of ``U diag(s) V^T``, approximately; zero of a zero matrix; or k.

    By Newton-Schulz: an odd polynomial of a matrix is the same polynomial of its singular values,
    so a few matrix polynomials replace a singular value decomposition. In the type of the matrix.

    Args:
        matrix: ``m x n`` with a norm of at most 1, or ``k x m x n``; overwritten. A far smaller
            one remains far smaller.
        steps: Newton-Schulz iterations.
    """
    a, b, c = COEFFICIENTS
    X = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    following = torch.empty_like(X)
    for _ in range(steps):
        # X <- a X + (b A + c A^2) X,  A = X X^T
        A = X @ X.mT
        add_product(X, add_product(A, A, A, beta=b, alpha=c), X, beta=a, out=following)
        X, following = following, X
    return X if X.shape == matrix.shape else X.mT


def with_equal_rows(residual: Tensor) -> Tensor:
    """``m x n``: rows of equal norms, together of norm 1; in place. Zero rows stay zero.

    Args:
        residual: ``m x n``, ``S / ||G||`` of a matrix that has one output per row, or
            ``k x m x n``.
    """
    m = residual.shape[-2]
    # S^_i = S_i / (||S_i|| sqrt(m))
    squares = torch.linalg.vector_norm(residual, dim=-1, keepdim=True, dtype=torch.float32).square()
    squares += FAINT / m
    return residual.div_((m * squares).sqrt().to(residual.dtype))
