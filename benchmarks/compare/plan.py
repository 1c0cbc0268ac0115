"""The pairs of learning rates that a method is tried at, one batch after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.compare.choice import Choice

Pair = tuple[float, float]
"""Learning rates of the low-rank matrices and of the rest."""

Best = Callable[[float | None, float | None], Choice | None]
"""The best pair run so far among those with the given `lr`, `rest_lr`; None admits any."""


@dataclass(frozen=True)
class Rates:
    """The learning rates of a method, ascending.

    Attributes:
        lr: those of the low-rank matrices.
        rest_lr: those of all other parameters; empty if one rate serves for both.
    """

    lr: tuple[float, ...]
    rest_lr: tuple[float, ...] = ()

    @property
    def first_rest(self) -> float | None:
        """The rest's rate at which `lr` is swept: the middle one, or the lower of two."""
        return self.rest_lr[(len(self.rest_lr) - 1) // 2] if self.rest_lr else None


def plan(rates: Rates, best: Best) -> Iterator[list[Pair]]:
    """Batches of pairs; each depends on the results of those before.

    All of `lr` at the first rate of the rest; all of `rest_lr` at the best `lr`; and, where another
    rate of the rest is better, the neighbours of the best `lr` there until it lies between them or
    at an end. A whole grid would be ``len(lr) * len(rest_lr)`` runs.

    Args:
        rates: the learning rates.
        best: looks up the best pair run so far, see :data:`Best`.
    """
    start = rates.first_rest
    if start is None:
        yield [(lr, lr) for lr in rates.lr]
        return
    yield [(lr, start) for lr in rates.lr]
    choice = best(None, start)
    if choice is None:
        return
    if others := [rest_lr for rest_lr in rates.rest_lr if rest_lr != start]:
        yield [(choice.lr, rest_lr) for rest_lr in others]
    choice = best(choice.lr, None)
    if choice is None or choice.rest_lr not in others:
        return
    tried, rest_lr = {choice.lr}, choice.rest_lr
    while near := [lr for lr in neighbours(rates.lr, choice.lr) if lr not in tried]:
        yield [(lr, rest_lr) for lr in near]
        tried.update(near)
        choice = best(None, rest_lr) or choice


def neighbours(rates: Sequence[float], rate: float) -> list[float]:
    """The next lower and the next higher of `rates` around `rate`, where there are."""
    lower, higher = [r for r in rates if r < rate], [r for r in rates if r > rate]
    return [*lower[-1:], *higher[:1]]
