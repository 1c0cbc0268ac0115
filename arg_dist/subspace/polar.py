"""The polar factor of a matrix by Newton-Schulz iterations: all its directions, at one size.

``O = U V^T`` for ``S = U diag(s) V^T``. An odd polynomial of S is the same polynomial of its
singular values, so five matrix polynomials replace a singular value decomposition. The coefficients
are Muon's (https://kellerjordan.github.io/posts/muon): steep at zero, so that after five steps
every singular value above 1 % of the norm lies near one (between 0.7 and 1.2), and smaller ones
have been multiplied by no more than 3.4445^5 = 485, which bounds what rounding can do.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of ``a x + b x^3 + c x^5``."""

FAINT = 1e-4
"""Share of the mean ||G_i||^2 below which a row fades out, being mostly rounding error."""


def polar_factor(matrix: Tensor, steps: int) -> Tensor:
    """``m x n``: the polar factor, approximately, in the type of the matrix; zero of a zero matrix.

    Args:
        matrix: ``m x n``, with a norm of at most 1. A far smaller one remains far smaller.
        steps: Newton-Schulz iterations.
    """
    a, b, c = COEFFICIENTS
    is_wide = matrix.shape[0] <= matrix.shape[1]
    X = matrix if is_wide else matrix.T
    del matrix  # or two of its size would be held beside the next X
    for _ in range(steps):
        # X <- a X + (b A + c A^2) X,  A = X X^T
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X if is_wide else X.T


def with_equal_rows(residual: Tensor) -> Tensor:
    """``m x n``: rows of equal norms, together of norm 1; in place. Zero rows stay zero.

    Args:
        residual: ``m x n``, ``S / ||G||`` of a matrix that has one output per row.
    """
    m = residual.shape[0]
    # S^_i = S_i / (||S_i|| sqrt(m))
    squares = torch.linalg.vector_norm(residual, dim=1, keepdim=True, dtype=torch.float32).square()
    squares += FAINT / m
    return residual.div_((m * squares).sqrt().to(residual.dtype))
