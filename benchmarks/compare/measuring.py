"""Measurements common to all runs: state, times, ranks."""

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
"""For each matrix, its refreshes: step, rank, share of the gradient's energy kept."""


@dataclass
class Clock:
    """Seconds of each step, and of the optimizer alone.

    `step_cpu` is the CPU time of this process: on a busy machine it approximates the time that the
    step takes on an idle one.
    """

    step: list[float] = field(default_factory=list)
    step_cpu: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)
    _began: float = 0.0
    _cpu_began: float = 0.0
    _optimizer_began: float = 0.0

    def begin_step(self) -> None:
        """Mark the start of a step."""
        _wait_for_device()
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def end_step(self) -> None:
        """Mark the end of a step."""
        _wait_for_device()
        self.step.append(time.perf_counter() - self._began)
        self.step_cpu.append(time.process_time() - self._cpu_began)

    def begin_optimizer(self) -> None:
        """Mark the start of the optimizer's part of a step."""
        _wait_for_device()
        self._optimizer_began = time.perf_counter()

    def end_optimizer(self) -> None:
        """Mark the end of the optimizer's part of a step."""
        _wait_for_device()
        self.optimizer.append(time.perf_counter() - self._optimizer_began)

    def as_json(self) -> dict[str, float | None]:
        """Medians, and the mean of the optimizer's seconds, since few steps refresh."""
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
        self._progress: list[dict[str, Any]] = []

    def so_far(self) -> dict[str, Any]:
        """All of it, for :meth:`go_on_from` in another process."""
        return {
            "clock": self.clock,
            "peaks": (self._count.peak, self._count.peak_all),
            "ranks": self._ranks,
            "refreshes": self._refreshes,
            "mean_ranks": self._mean_ranks,
            "progress": self._progress,
        }

    def go_on_from(self, earlier: dict[str, Any]) -> None:
        """Go on from what :meth:`so_far` gave in another process."""
        self.clock = earlier["clock"]
        self._count.peak, self._count.peak_all = earlier["peaks"]
        self._ranks, self._refreshes = earlier["ranks"], earlier["refreshes"]
        self._mean_ranks, self._progress = earlier["mean_ranks"], earlier["progress"]

    def at_evaluation(self, step: int) -> None:
        """Note what `step` has come to: seconds of training, state, rank."""
        self._progress.append(
            {
                "step": step,
                "seconds": sum(self.clock.step_cpu),
                "optimizer_seconds": sum(self.clock.optimizer),
                "state": self._count.now.logical,
                "rank": self._mean_ranks[-1] if self._mean_ranks else None,
            }
        )

    def after_step(self, step: int) -> None:
        """Sample the optimizers after `step`, counted from 1."""
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
        """The measurements of a run of `steps` steps, as JSON."""
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
            "progress": self._progress,
        }


def flap(ranks: RankHistory, steps: int) -> float | None:
    """How much ranks change between refreshes in the second half of a run.

    The mean of ``|new - old| / old`` over a matrix's refreshes in the second half of `steps`, then
    the median over matrices. None if no matrix has two refreshes to compare.
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
