"""Learning-rate schedule: linear warm-up, then cosine decay to a share of the peak."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(step: int, *, steps: int, warmup: int, min_lr_ratio: float) -> float:
    """The share of the peak learning rate at `step`, counted from 0.

    The first step already updates the weights: the warm-up is 1/warmup, 2/warmup, ..., 1.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


class WarmupCosine(LambdaLR):
    """The scheduler of :func:`warmup_cosine`, with one peak for all parameter groups.

    Its state is only the step and the peak: engines group the parameters differently, and a run may
    be resumed with other `steps`, which changes the rest of the schedule.
    """

    def __init__(
        self, optimizer: Optimizer, *, steps: int, warmup: int, min_lr_ratio: float
    ) -> None:
        def share(step: int) -> float:
            return warmup_cosine(step, steps=steps, warmup=warmup, min_lr_ratio=min_lr_ratio)

        super().__init__(optimizer, share)

    def state_dict(self) -> dict[str, Any]:
        """The completed steps and the peak, as JSON."""
        return {"step": self.last_epoch, "peak": float(self.base_lrs[0])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Moves to the step of `state_dict`."""
        self.last_epoch = state_dict["step"]
        self._step_count = self.last_epoch + 1
        self.set_peak(state_dict["peak"])

    def set_peak(self, peak: float) -> None:
        """Changes the peak and sets all groups to the learning rate of the current step."""
        self.base_lrs = [peak for _ in self.optimizer.param_groups]
        rate = peak * self.lr_lambdas[0](self.last_epoch)
        for group in self.optimizer.param_groups:
            group["initial_lr"], group["lr"] = peak, rate
        self._last_lr = [rate for _ in self.optimizer.param_groups]


def warmup_cosine_scheduler(
    *, steps: int, warmup: int, min_lr_ratio: float
) -> Callable[[Optimizer], WarmupCosine]:
    """A scheduler factory, as ``deepspeed.initialize`` takes it."""

    def factory(optimizer: Optimizer) -> WarmupCosine:
        return WarmupCosine(optimizer, steps=steps, warmup=warmup, min_lr_ratio=min_lr_ratio)

    return factory
