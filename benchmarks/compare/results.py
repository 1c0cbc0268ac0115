"""The results of a comparison: one row per method, computed from its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from benchmarks.compare.choice import best_rates, pair_of, rates_in_words, value_of
from benchmarks.compare.records import Comparison
from launchers.reporting.measures import MEASURES, Measure

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Tried:
    """A pair of learning rates and what it came to on the sweep's seed.

    Attributes:
        lr: learning rate of the low-rank matrices.
        rest_lr: that of all other parameters.
        final: final value of the measure; None if the run has no result.
    """

    lr: float
    rest_lr: float
    final: float | None


@dataclass(frozen=True)
class Row:
    """The results of one method.

    Attributes:
        method: its name.
        swept: the pairs of learning rates tried, by `rest_lr`, then `lr`.
        lr: the best learning rate of the low-rank matrices; None if no run finished.
        rest_lr: that of all other parameters, of the same pair.
        edge: whether `lr` is the lowest or highest tried.
        rest_edge: whether `rest_lr` is; False where one rate serves for both.
        by_seed: final value of the best pair by seed.
        median: median of `by_seed`; None if any seed has no result.
        spread: maximum minus minimum of `by_seed`.
        matrices: peak state bytes of the low-rank matrices, `logical` and `storage`: maximum over
            seeds at the best pair.
        adamw_matrices: AdamW's state bytes for the same matrices.
        state: as `matrices`, for all parameters.
        adamw_state: AdamW's state bytes for all parameters.
        mean_rank: mean over matrices, steps and seeds; None for methods that report no ranks.
        final_rank: mean over matrices and seeds after the last step.
        flap: see :func:`benchmarks.compare.measuring.flap`; median over seeds.
        seconds: seconds per step: median over seeds of each of the clock's numbers.
        lost: runs that diverged or were killed, with the reason.
    """

    method: str
    swept: list[Tried]
    lr: float | None = None
    rest_lr: float | None = None
    edge: bool = False
    rest_edge: bool = False
    by_seed: dict[int, float | None] | None = None
    median: float | None = None
    spread: float | None = None
    matrices: dict[str, int] | None = None
    adamw_matrices: int = 0
    state: dict[str, int] | None = None
    adamw_state: int = 0
    mean_rank: float | None = None
    final_rank: float | None = None
    flap: float | None = None
    seconds: dict[str, float] | None = None
    lost: tuple[str, ...] = ()

    @property
    def two_rates(self) -> bool:
        """Whether the low-rank matrices and the rest had a learning rate each."""
        return any(tried.lr != tried.rest_lr for tried in self.swept)

    def share(self, count: str) -> float | None:
        """State of the matrices relative to AdamW's; `count` is ``logical`` or ``storage``."""
        return self.matrices[count] / self.adamw_matrices if self.matrices else None


def measure_of(runs: Sequence[Run]) -> Measure:
    """The measure that ranks `runs`; held-out loss if none has a result."""
    keys = {run["measure"] for run in runs if "measure" in run}
    return MEASURES[keys.pop()] if keys else MEASURES["held_out_loss"]


def rows_of(comparison: Comparison, runs: Sequence[Run]) -> list[Row]:
    """One row per method that has runs, in the comparison's order."""
    measure = measure_of(runs)
    by_method = {name: [r for r in runs if r["method"] == name] for name in comparison.methods}
    return [
        _row(name, own, comparison.sweep_seed, measure) for name, own in by_method.items() if own
    ]


def best_runs(row: Row, runs: Sequence[Run]) -> list[Run]:
    """The finished runs of a row's method at its best pair of rates, sorted by seed."""
    best = (row.method, row.lr, row.rest_lr)
    own = [run for run in runs if (run["method"], *pair_of(run)) == best]
    return sorted((r for r in own if r["status"] == "finished"), key=lambda run: run["seed"])


def _row(name: str, runs: Sequence[Run], sweep_seed: int, measure: Measure) -> Row:
    def reached(run: Run) -> float | None:
        return value_of(run, measure) if run["status"] == "finished" else None

    swept = [Tried(*pair_of(run), reached(run)) for run in runs if run["seed"] == sweep_seed]
    swept.sort(key=lambda tried: (tried.rest_lr, tried.lr))
    lost = tuple(
        f"{rates_in_words(*pair_of(run))}, seed {run['seed']}: {run['status']}, {run['error']}"
        for run in runs
        if run["status"] != "finished"
    )
    row = Row(name, swept, lost=lost)
    choice = best_rates(runs, sweep_seed, measure)
    if choice is None:
        return row
    best = (choice.lr, choice.rest_lr)
    at_best = sorted((r for r in runs if pair_of(r) == best), key=lambda run: run["seed"])
    by_seed = {run["seed"]: reached(run) for run in at_best}
    finished = best_runs(Row(name, [], *best), runs)
    values = [value for value in by_seed.values() if value is not None]
    complete = len(values) == len(by_seed)
    return Row(
        name,
        swept,
        *best,
        edge=choice.edge,
        rest_edge=choice.rest_edge,
        by_seed=by_seed,
        median=median(values) if complete else None,
        spread=max(values) - min(values) if complete else None,
        matrices=_most(finished, "matrices"),
        adamw_matrices=finished[0]["state"]["matrices"]["adamw"],
        state=_most(finished, "all"),
        adamw_state=finished[0]["state"]["all"]["adamw"],
        mean_rank=_mean(finished, "mean_rank"),
        final_rank=_mean(finished, "final_rank"),
        flap=_median([run["flap"] for run in finished]),
        seconds={
            key: median(run["seconds"][key] for run in finished) for key in finished[0]["seconds"]
        },
        lost=lost,
    )


def results_json(comparison: Comparison, runs: Sequence[Run]) -> dict[str, Any]:
    """The contents of ``results.json``: the comparison, the hardware, and all rows."""
    rows = rows_of(comparison, runs)
    hardware = [run["hardware"] for run in runs if "hardware" in run]
    return {
        **asdict(comparison),
        "measure": measure_of(runs).key,
        "hardware": [each for i, each in enumerate(hardware) if each not in hardware[:i]],
        "rows": [
            {**asdict(row), "share": {c: row.share(c) for c in ("logical", "storage")}}
            for row in rows
        ],
    }


def _most(runs: Sequence[Run], part: str) -> dict[str, int]:
    peaks = [run["state"][part]["peak"] for run in runs]
    return {count: max(peak[count] for peak in peaks) for count in ("logical", "storage")}


def _mean(runs: Sequence[Run], key: str) -> float | None:
    values = [run[key] for run in runs if run[key] is not None]
    return fmean(values) if values else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
