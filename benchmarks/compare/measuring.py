"""What is measured of every run in the same way: state, times, ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import torch

import arg_dist
from benchmarks.compare.counting import StateCount
from benchmarks.compare.optimizers import Training

RankHistory = dict[str, list[tuple[int, int, float]]]
"""For each matrix its refreshes: the step, the rank, the share of the gradient's energy kept."""


@dataclass
class Clock:
    """The seconds of each step, and in it those of the optimizer alone.

    `step_cpu` is the time that this process has had of a core: where other work runs beside it,
    it is what the step takes on a machine that has nothing else to do.
    """

    step: list[float] = field(default_factory=list)
    step_cpu: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)
    _began: float = 0.0
    _cpu_began: float = 0.0
    _optimizer_began: float = 0.0

    def begin_step(self) -> None:
        """A step begins."""
        _wait_for_device()
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def end_step(self) -> None:
        """It ends."""
        _wait_for_device()
        self.step.append(time.perf_counter() - self._began)
        self.step_cpu.append(time.process_time() - self._cpu_began)

    def begin_optimizer(self) -> None:
        """The optimizer's part of a step begins."""
        _wait_for_device()
        self._optimizer_began = time.perf_counter()

    def end_optimizer(self) -> None:
        """It ends."""
        _wait_for_device()
        self.optimizer.append(time.perf_counter() - self._optimizer_began)

    def as_json(self) -> dict[str, float | None]:
        """Medians, and the mean of the optimizer's seconds: new bases come in few steps."""
        if not self.step:
            return {}
        return {
            "step": median(self.step),
            "step_cpu": median(self.step_cpu),
            "optimizer": median(self.optimizer),
            "optimizer_mean": fmean(self.optimizer),
        }


class Measurements:
    """Watches the optimizers of one run."""

    def __init__(self, training: Training) -> None:
        self.clock = Clock()
        self._training = training
        self._count = StateCount(training.counted)
        self._ranks: RankHistory = {}
        self._refreshes: dict[str, int] = {}
        self._mean_ranks: list[float] = []

    def after_step(self, step: int) -> None:
        """Looks at the optimizers after `step`, counted from 1."""
        self._count.look(self._training.optimizers)
        for optimizer in self._training.optimizers:
            if isinstance(optimizer, arg_dist.AdaRankGrad):
                self._look_at_ranks(step, optimizer.stats())

    def _look_at_ranks(self, step: int, stats: list[dict[str, Any]]) -> None:
        known = [matrix for matrix in stats if matrix["rank"]]
        for matrix in known:
            name = matrix["name"]
            if self._refreshes.get(name) != matrix["refreshes"]:
                self._refreshes[name] = matrix["refreshes"]
                point = (step, matrix["rank"], round(matrix["energy"], 4))
                self._ranks.setdefault(name, []).append(point)
        if known:
            self._mean_ranks.append(fmean(matrix["rank"] for matrix in known))

    def as_json(self, steps: int) -> dict[str, Any]:
        """What a record keeps; `steps` is the length of the run."""
        ranks, training = self._mean_ranks, self._training
        return {
            "state": self._count.as_json(
                matrix_elements=training.matrix_elements, elements=training.elements
            ),
            "seconds": self.clock.as_json(),
            "ranks": self._ranks,
            "mean_rank": fmean(ranks) if ranks else None,
            "final_rank": ranks[-1] if ranks else None,
            "flap": flap(self._ranks, steps),
        }


def flap(ranks: RankHistory, steps: int) -> float | None:
    """How much ranks move from one refresh to the next once a run is under way.

    The mean of ``|new - old| / old`` over the refreshes of a matrix in the second half of `steps`;
    of that the median over the matrices. None if there are no two refreshes to compare.
    """
    means = []
    for points in ranks.values():
        changes = [
            abs(new - old) / old
            for (_, old, _), (step, new, _) in pairwise(points)
            if step > steps / 2
        ]
        if changes:
            means.append(fmean(changes))
    return median(means) if means else None


def _wait_for_device() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
