"""The learning rate's course: linear warm-up, then a cosine down to a share of the peak."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(step: int, *, steps: int, warmup: int, min_lr_ratio: float) -> float:
    """The share of the peak learning rate for `step`, counted from 0.

    The first step already moves the weights: the warm-up counts 1/warmup, 2/warmup, ..., 1.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine_scheduler(
    *, steps: int, warmup: int, min_lr_ratio: float
) -> Callable[[Optimizer], LambdaLR]:
    """A scheduler factory, as ``deepspeed.initialize`` takes it."""

    def factory(optimizer: Optimizer) -> LambdaLR:
        def share(step: int) -> float:
            return warmup_cosine(step, steps=steps, warmup=warmup, min_lr_ratio=min_lr_ratio)

        return LambdaLR(optimizer, share)

    return factory
