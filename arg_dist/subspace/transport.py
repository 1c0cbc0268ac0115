"""Transport of Adam's moments from one basis to the next.

With ``R = Q_new^T Q_old``, the first moment is transported exactly, ``M <- M R^T``, as it is linear
in the gradient. The second moment is not linear; the rules are:

========== ===================================================================== ================
squared    ``V <- V (R*R)^T``: positive, independent of the basis's signs        the default
paper      ``V <- |V R^T|``: literal, with abs() as it may turn negative         arXiv 2410.17881
ldadam     ``|(V^ - M^*M^)(R*R)^T + (M^ R^T)^2|``, bias-corrected moments        arXiv 2410.16103
none       both moments are left unchanged, as in GaLore                         arXiv 2403.03507
========== ===================================================================== ================

A direction outside the old basis has no second moment yet; with ``V = 0`` under a bias correction
of many steps, its first step would be three times the learning rate. Under `squared` (and for the
directions that `none` adds), the uncovered share is therefore initialized with the rank-one
estimate of its value, row energy times direction energy over total energy (Adafactor, arXiv
1804.04235).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rule = Literal["squared", "paper", "ldadam", "none"]


def transport_moments(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rotation: Tensor,
    projected: Tensor,
    energies: Tensor,
    *,
    rule: Rule,
    step: int,
    betas: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Both moments in the new basis, ``moment x new``; the inputs are not modified.

    Args:
        exp_avg: ``moment x old``, first moment M.
        exp_avg_sq: ``moment x old``, second moment V.
        rotation: ``new x old``, ``R = Q_new^T Q_old``.
        projected: ``moment x new``, the gradient in the new basis.
        energies: ``new``, ``||G q_i||^2`` of the new directions over all rows.
        rule: transport rule of the second moment.
        step: number of steps in the moments, for their bias correction.
        betas: decay of the first and the second moment.
    """
    weight1, weight2 = (1 - beta**step for beta in betas)
    squares = rotation.square()
    if rule == "none":
        return _stay(exp_avg, exp_avg_sq, weight2 * rank_one_energy(projected, energies))
    # M <- M R^T
    moved = exp_avg @ rotation.T
    if rule == "paper":
        return moved, (exp_avg_sq @ rotation.T).abs_()
    if rule == "ldadam":
        mean, mean_sq = exp_avg / weight1, exp_avg_sq / weight2
        # V <- (1 - b2^t) | (V^ - M^ * M^) (R*R)^T + (M^ R^T)^2 |
        spread = (mean_sq - mean.square()) @ squares.T
        return moved, (spread + (mean @ rotation.T).square()).abs_().mul_(weight2)
    # V <- V (R*R)^T  +  (1 - sum_j R_ij^2) * estimate for the uncovered share of direction i
    uncovered = (1 - squares.sum(1)).clamp_(0, 1)
    fair = rank_one_energy(projected, energies).mul_(weight2 * uncovered)
    return moved, fair.addmm_(exp_avg_sq, squares.T)


def rank_one_energy(projected: Tensor, energies: Tensor) -> Tensor:
    """``moment x rank``: rank-one estimate of ``P*P`` from its row sums and direction sums.

    Args:
        projected: ``moment x rank``, these rows of the projected gradient.
        energies: ``rank``, sum of ``P*P`` over *all* rows, including other processes'.
    """
    energies = energies.to(projected.dtype)
    # E_ki = (sum_i P_ki^2) (sum_k P_ki^2) / sum_ki P_ki^2
    shares = energies / energies.sum().clamp_min(torch.finfo(projected.dtype).tiny)
    return projected.square().sum(1, keepdim=True) * shares


def _stay(exp_avg: Tensor, exp_avg_sq: Tensor, fair: Tensor) -> tuple[Tensor, Tensor]:
    """The old moments, truncated or padded to the width of `fair`, whose columns fill ``V``."""
    rows, width = fair.shape
    common = min(width, exp_avg.shape[1])
    moved = exp_avg.new_zeros(rows, width)
    moved[:, :common] = exp_avg[:, :common]
    fair[:, :common] = exp_avg_sq[:, :common]
    return moved, fair
