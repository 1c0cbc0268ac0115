"""What a comparison has found: one row for each method, out of its runs."""

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
    """One method.

    Attributes:
        method: its name.
        swept: what each learning rate reached on the sweep's seed; None where a run has no result.
        lr: the best of them; None if no run came to its end.
        edge: whether it is the lowest or the highest.
        by_seed: what the best rate reached on each seed.
        median: of these; None as soon as one has no result.
        spread: the largest less the smallest of these.
        matrices: bytes that are kept of the low-rank matrices, at the peak: `logical` and
            `storage`, the most of any seed at the best rate.
        adamw_matrices: what AdamW keeps of them.
        state: as `matrices`, of all parameters.
        adamw_state: what AdamW keeps.
        mean_rank: over matrices, steps and seeds; None for methods without ranks to tell.
        final_rank: over matrices and seeds, after the last step.
        flap: see :func:`benchmarks.compare.measuring.flap`; the median of the seeds.
        seconds: of a step: the median over the seeds of each of the clock's numbers.
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
        """The matrices' state as a share of AdamW's; `count` is ``logical`` or ``storage``."""
        return self.matrices[count] / self.adamw_matrices if self.matrices else None


def measure_of(runs: Sequence[Run]) -> Measure:
    """What judges `runs`; those without any result say nothing."""
    keys = {run["measure"] for run in runs if "measure" in run}
    return MEASURES[keys.pop()] if keys else MEASURES["held_out_loss"]


def rows_of(comparison: Comparison, runs: Sequence[Run]) -> list[Row]:
    """One row for each method that has runs, in the comparison's order."""
    measure = measure_of(runs)
    by_method = {name: [r for r in runs if r["method"] == name] for name in comparison.methods}
    return [
        _row(name, own, comparison.sweep_seed, measure) for name, own in by_method.items() if own
    ]


def best_runs(row: Row, runs: Sequence[Run]) -> list[Run]:
    """The finished runs of a row's method at its best rate, by seed."""
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
    """``results.json``: what was compared, on what, and each row."""
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
