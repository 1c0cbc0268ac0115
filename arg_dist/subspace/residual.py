"""The part of the gradient outside the basis, followed without any state of its own.

Adam's direction N says how far to go along the projected gradient P. Row by row, the residual
``G - P Q^T`` goes as far in proportion: scaled by ``phi_i = ||N_i|| / ||P_i||`` (Fira, arXiv
2410.01623, section 4.1). A limiter keeps its norm from growing by more than a factor at a step
(section 4.2); the norm before is all the state there is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arg_dist.subspace.exchange import Steps, sum_scatter
from arg_dist.subspace.spread import Spread


def scaled_residual(
    direction: Tensor,
    projected: Tensor,
    row_sq: Tensor,
    norm_before: Tensor | None,
    spread: Spread,
    *,
    growth: float,
) -> Steps[tuple[Tensor, Tensor]]:
    """The factor of each row of the residual, and the norm of what comes out.

    Args:
        direction: ``moment.keep x rank``, N.
        projected: ``moment.keep x rank``, P.
        row_sq: ``moment.keep``, ``||G_i||^2``, fp32.
        norm_before: the norm that the step before returned, fp64; None at the first step.
        spread: how the matrix lies over the processes.
        growth: largest growth of the norm.

    Returns:
        ``moment.keep``, the factors; and the norm, an fp64 scalar.
    """
    projected_sq = projected.square().sum(1)
    # phi_i = ||N_i|| / ||P_i||
    factors = (direction.square().sum(1) / projected_sq).sqrt_()
    factors = torch.where(projected_sq > 0, factors, 0.0)
    # ||phi (G - P Q^T)||^2 = sum_i phi_i^2 (||G_i||^2 - ||P_i||^2), as Q is orthonormal
    outside_sq = (row_sq - projected_sq).clamp_min_(0)
    part = (factors.square() * outside_sq).sum(dtype=torch.float64).view(1)
    everyone = spread.whole(1)
    norm = (yield from sum_scatter(part, everyone, everyone, spread.me)).sqrt().view(())
    if norm_before is not None:
        # S <- S min(1, growth ||S_before|| / ||S||)
        limited = torch.minimum(norm, growth * norm_before)
        factors = factors * torch.where(norm > 0, limited / norm, 1.0).float()
        norm = limited
    return factors, norm
