"""Comparable timings: interleaved in one process, so that all see the same machine conditions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

WARM_UP = 2
"""Untimed calls before the first round."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Iterable[float]) -> Spread:
        """The spread of at least one number."""
        given = sorted(numbers)
        if len(given) == 1:
            return cls(given[0], given[0], given[0])
        low, middle, high = quantiles(given, n=4, method="inclusive")
        return cls(middle, low, high)

    def times(self, factor: float) -> Spread:
        """All three values multiplied by a positive number."""
        return Spread(factor * self.median, factor * self.low, factor * self.high)


@dataclass(frozen=True)
class Times:
    """Seconds of one function, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of all rounds."""
        return median(self.seconds)

    @property
    def spread(self) -> Spread:
        """Median and quartiles of all rounds."""
        return Spread.of(self.seconds)

    def over(self, other: Times) -> Spread:
        """Ratios per round: both times of a round see the same machine conditions."""
        return Spread.of(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    def less(self, other: Times) -> Spread:
        """Differences per round, in seconds."""
        return Spread.of(a - b for a, b in zip(self.seconds, other.seconds, strict=True))

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Times:
        """The inverse of :meth:`as_json`."""
        return cls(tuple(kept["rounds"]))

    def as_json(self) -> dict[str, Any]:
        """All rounds in order, with median and quartiles."""
        spread = self.spread
        return {
            "median": spread.median,
            "quartiles": [spread.low, spread.high],
            "rounds": self.seconds,
        }


def wait_for_device() -> None:
    """Synchronize the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def seconds_of(function: Callable[[], object]) -> float:
    """Time of one call, until the accelerator has finished what it starts."""
    wait_for_device()
    began = time.perf_counter()
    function()
    wait_for_device()
    return time.perf_counter() - began


Timed = Callable[[Callable[[], object]], float]
"""Seconds of one call of a function, as of :func:`seconds_of`."""


def in_turns(
    functions: Mapping[str, Callable[[], object]], rounds: int, timed: Timed = seconds_of
) -> dict[str, Times]:
    """Time every function as :func:`turns` does, and return the rounds of each by name."""
    times = list(turns(functions, rounds, timed))
    return {name: Times(tuple(each[name] for each in times)) for name in functions}


def turns(
    functions: Mapping[str, Callable[[], object]], rounds: int, timed: Timed = seconds_of
) -> Iterator[dict[str, float]]:
    """Time every function once per round, rotating the order by one each round.

    Args:
        functions: the functions to time, by name.
        rounds: timed calls of each.
        timed: times one call.

    Yields:
        For each round, the seconds of every function by name.
    """
    names = list(functions)
    for name in names:
        for _ in range(WARM_UP):
            functions[name]()
    for turn in range(rounds):
        first = turn % len(names)
        yield {name: timed(functions[name]) for name in names[first:] + names[:first]}
