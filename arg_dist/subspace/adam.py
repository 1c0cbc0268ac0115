"""Adam's direction, in a subspace or at full rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def adam_direction(
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Update both moments in place and return the direction ``N``; all of one shape and type.

    Block 3 of arXiv 2410.17881, algorithm 3 (Kingma and Ba 2015, algorithm 1).

    Args:
        gradient: the projected gradient P, ``moment x rank``, or any gradient.
        exp_avg: first moment M.
        exp_avg_sq: second moment V.
        step: number of this step, starting at 1.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
    """
    beta1, beta2 = betas
    # M = b1 M + (1 - b1) P ;  V = b2 V + (1 - b2) P*P
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    # N = M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps), in as few passes over memory as possible
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    root = exp_avg_sq.sqrt().mul_(correction1 / math.sqrt(correction2)).add_(eps * correction1)
    return torch.div(exp_avg, root, out=root)
