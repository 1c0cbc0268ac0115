"""The results of a comparison: one row per method, computed from its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from benchmarks.compare.choice import best_rate, value_of
from benchmarks.compare.records import Comparison
from launchers.reporting.measures import MEASURES, Measure

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """The results of one method.

    Attributes:
        method: its name.
        swept: final value by learning rate on the sweep's seed; None where a run has no result.
        lr: the best learning rate; None if no run finished.
        edge: whether it is the lowest or highest.
        by_seed: final value of the best rate by seed.
        median: median of `by_seed`; None if any seed has no result.
        spread: maximum minus minimum of `by_seed`.
        matrices: peak state bytes of the low-rank matrices, `logical` and `storage`: maximum over
            seeds at the best rate.
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
    swept: dict[float, float | None]
    lr: float | None = None
    edge: bool = False
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
    """The finished runs of a row's method at its best rate, sorted by seed."""
    own = [run for run in runs if run["method"] == row.method and run["lr"] == row.lr]
    return sorted((r for r in own if r["status"] == "finished"), key=lambda run: run["seed"])


def _row(name: str, runs: Sequence[Run], sweep_seed: int, measure: Measure) -> Row:
    def reached(run: Run) -> float | None:
        return value_of(run, measure) if run["status"] == "finished" else None

    swept = sorted((run for run in runs if run["seed"] == sweep_seed), key=lambda run: run["lr"])
    lost = tuple(
        f"{run['lr']:g}, seed {run['seed']}: {run['status']}, {run['error']}"
        for run in runs
        if run["status"] != "finished"
    )
    row = Row(name, {run["lr"]: reached(run) for run in swept}, lost=lost)
    choice = best_rate(runs, sweep_seed, measure)
    if choice is None:
        return row
    at_best = sorted((r for r in runs if r["lr"] == choice.lr), key=lambda run: run["seed"])
    by_seed = {run["seed"]: reached(run) for run in at_best}
    finished = best_runs(Row(name, {}, lr=choice.lr), runs)
    values = [value for value in by_seed.values() if value is not None]
    complete = len(values) == len(by_seed)
    return Row(
        name,
        row.swept,
        lr=choice.lr,
        edge=choice.edge,
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
