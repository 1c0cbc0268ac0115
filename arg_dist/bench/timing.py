"""Times that can be compared: taken in turns, in one process, so that all meet the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

WARM_UP = 2
"""Calls before the first that counts."""


@dataclass(frozen=True)
class Times:
    """Seconds of one function, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of all rounds."""
        return median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The fastest and the slowest round."""
        return min(self.seconds), max(self.seconds)

    def over(self, other: Times) -> float:
        """The median of the rounds' ratios: both of one round have met the same machine."""
        return median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def in_turns(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """Calls every function once a round, in an order that turns by one from round to round.

    Args:
        functions: what is timed, by name.
        rounds: timed calls of each.
    """
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(WARM_UP):
            functions[name]()
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(_timed(functions[name]))
    return {name: Times(tuple(taken)) for name, taken in seconds.items()}


def _timed(function: Callable[[], object]) -> float:
    _wait_for_device()
    began = time.perf_counter()
    function()
    _wait_for_device()
    return time.perf_counter() - began


def _wait_for_device() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
