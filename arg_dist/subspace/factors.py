"""A matrix as the product of two thin ones: the truncated randomized SVD."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLE, POWER_PASSES, SEED = 8, 4, 0
FIRST_WIDTH = 16
"""Directions that are looked for at first, where their energy decides how many are kept."""


class Factors(NamedTuple):
    """``D ~ L R``.

    Attributes:
        left: ``rows x rank``, L.
        right: ``rank x columns``, R.
        error: ``||D - L R||_F / ||D||_F``.
    """

    left: Tensor
    right: Tensor
    error: float

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.left.shape[1]


def factored(matrix: Tensor, *, rank: int | None = None, energy: float | None = None) -> Factors:
    """The leading directions of a matrix (Halko, Martinsson and Tropp, 2011, algorithm 5.1).

    Args:
        matrix: ``rows x columns``, D, fp32, not zero.
        rank: how many are kept, or all there are; None if `energy` decides it.
        energy: share of ``||D||_F^2`` that those kept have at least, in (0, 1]; 1 for all of them.
    """
    short, norm_sq = min(matrix.shape), float(matrix.double().square().sum())
    share = 0.0 if energy is None else energy
    width = min(short, FIRST_WIDTH if rank is None else rank)
    while True:
        left, values, right = _leading(matrix, width)
        kept = list(accumulate(value * value / norm_sq for value in values.tolist()))
        if rank is not None or width == short or share <= kept[-1] < 1:
            break
        width = min(short, 2 * width)
    if rank is None and share < 1:
        width = min(width, sum(each < share for each in kept) + 1)
    # D ~ U diag(s) V^T = (U s^1/2) (s^1/2 V^T)
    roots = values[:width].sqrt()
    left, right = left[:, :width] * roots, roots[:, None] * right[:, :width].T
    missing = torch.linalg.vector_norm(matrix - left @ right, dtype=torch.float64)
    return Factors(left.contiguous(), right.contiguous(), float(missing) / norm_sq**0.5)


def _leading(matrix: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """``U, s, V`` of the `width` leading directions, the same ones every time."""
    sketched = min(*matrix.shape, width + OVERSAMPLE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        if sketched == min(matrix.shape):
            left, values, transposed = torch.linalg.svd(matrix, full_matrices=False)
            right = transposed.T
        else:
            left, values, right = torch.svd_lowrank(matrix, q=sketched, niter=POWER_PASSES)
    return left[:, :width], values[:width], right[:, :width]
