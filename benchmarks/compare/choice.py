"""Select the best learning rate of a method from the results of its runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from launchers.reporting.measures import Measure

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """The best learning rate of a method.

    Attributes:
        lr: the learning rate.
        edge: whether it is the lowest or highest of several, so a better one may be out of range.
        seeds: the seeds whose median selected it.
    """

    lr: float
    edge: bool
    seeds: tuple[int, ...]


def best_rate(runs: Iterable[Run], sweep_seed: int, measure: Measure) -> Choice | None:
    """The best learning rate of one method; None if no run finished.

    Rates are ranked by the sweep's seed or, if every rate was run on the same further seeds, by the
    median over all of them. A run that diverged or was killed ranks below any other.

    Args:
        runs: runs of one method.
        sweep_seed: the seed on which all rates were run.
        measure: the measure that ranks the runs.
    """
    by_rate: dict[float, dict[int, float]] = {}
    for run in runs:
        by_rate.setdefault(run["lr"], {})[run["seed"]] = value_of(run, measure)
    swept = {lr: seeds for lr, seeds in by_rate.items() if sweep_seed in seeds}
    if not swept:
        return None
    common = set.intersection(*(set(seeds) for seeds in swept.values()))
    score = {lr: median(seeds[seed] for seed in common) for lr, seeds in swept.items()}
    worst = float("inf") if measure.lower_is_better else float("-inf")
    if all(value == worst for value in score.values()):
        return None
    best = (min if measure.lower_is_better else max)(sorted(score), key=lambda lr: score[lr])
    ends = (min(score), max(score))
    return Choice(best, len(score) > 1 and best in ends, tuple(sorted(common)))


def value_of(run: Run, measure: Measure) -> float:
    """The final value of a run; the worst possible if it did not finish."""
    if run["status"] == "finished" and run["final"] is not None:
        return float(run["final"])
    return float("inf") if measure.lower_is_better else float("-inf")


def interleaved(rows: Sequence[Sequence[Any]]) -> list[Any]:
    """The first item of each row, then the second of each, and so on (round robin)."""
    longest = max(map(len, rows), default=0)
    return [row[i] for i in range(longest) for row in rows if i < len(row)]
