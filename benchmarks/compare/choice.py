"""Select the best learning rates of a method from the results of its runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from launchers.reporting.measures import Measure

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """The best learning rates of a method.

    Attributes:
        lr: that of the low-rank matrices.
        rest_lr: that of all other parameters.
        edge: whether `lr` is the lowest or highest of several, so a better one may be out of range.
        rest_edge: the same of `rest_lr`; False where it is always that of the matrices.
        seeds: the seeds whose median selected them.
    """

    lr: float
    rest_lr: float
    edge: bool
    rest_edge: bool
    seeds: tuple[int, ...]


def best_rates(runs: Iterable[Run], sweep_seed: int, measure: Measure) -> Choice | None:
    """The best pair of learning rates of one method; None if no run finished.

    Pairs are ranked by the sweep's seed or, if every pair was run on the same further seeds, by the
    median over all of them. A run that diverged or was killed ranks below any other.

    Args:
        runs: runs of one method.
        sweep_seed: the seed on which all pairs were run.
        measure: the measure that ranks the runs.
    """
    by_pair: dict[tuple[float, float], dict[int, float]] = {}
    for run in runs:
        by_pair.setdefault(pair_of(run), {})[run["seed"]] = value_of(run, measure)
    swept = {pair: seeds for pair, seeds in by_pair.items() if sweep_seed in seeds}
    if not swept:
        return None
    common = set.intersection(*(set(seeds) for seeds in swept.values()))
    score = {pair: median(seeds[seed] for seed in common) for pair, seeds in swept.items()}
    worst = float("inf") if measure.lower_is_better else float("-inf")
    if all(value == worst for value in score.values()):
        return None
    best = (min if measure.lower_is_better else max)(sorted(score), key=lambda pair: score[pair])
    rests = {rest_lr for lr, rest_lr in score if rest_lr != lr} and {rest for _, rest in score}
    return Choice(
        *best,
        edge=_at_an_end(best[0], {lr for lr, _ in score}),
        rest_edge=_at_an_end(best[1], rests),
        seeds=tuple(sorted(common)),
    )


def _at_an_end(rate: float, tried: Collection[float]) -> bool:
    return len(tried) > 1 and rate in (min(tried), max(tried))


def pair_of(run: Run) -> tuple[float, float]:
    """The learning rates of a run: of the low-rank matrices, and of the rest."""
    return run["lr"], run["rest_lr"]


def rates_in_words(lr: float, rest_lr: float) -> str:
    """``"0.012, rest 0.008"``, or one number if they are equal."""
    return f"{lr:g}" if lr == rest_lr else f"{lr:g}, rest {rest_lr:g}"


def value_of(run: Run, measure: Measure) -> float:
    """The final value of a run; the worst possible if it did not finish."""
    if run["status"] == "finished" and run["final"] is not None:
        return float(run["final"])
    return float("inf") if measure.lower_is_better else float("-inf")


def interleaved(rows: Sequence[Sequence[Any]]) -> list[Any]:
    """The first item of each row, then the second of each, and so on (round robin)."""
    longest = max(map(len, rows), default=0)
    return [row[i] for i in range(longest) for row in rows if i < len(row)]
