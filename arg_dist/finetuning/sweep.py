"""Several fine-tuning runs that differ in optimizer, learning rate and seed, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from arg_dist.report import MEASURES, read_report


@dataclass(frozen=True)
class Trial:
    """One run: `lr` as the user wrote it, since it is a part of the directory's name."""

    optimizer: str
    lr: str
    seed: int

    def directory(self, out: Path) -> Path:
        """Where the run leaves its files."""
        return out / f"{self.optimizer}-{self.lr}-seed{self.seed}"

    def report(self, out: Path) -> dict[str, Any] | None:
        """The report of the run, once it is finished."""
        try:
            report = read_report(self.directory(out))
        except (OSError, ValueError):
            return None
        return report if report["status"] == "finished" else None


def best_lr(reports: dict[Trial, dict[str, Any]], optimizer: str) -> str:
    """The learning rate of the run of `optimizer` with the best measure at its end."""
    of_optimizer = {t.lr: r for t, r in reports.items() if t.optimizer == optimizer}
    measure = MEASURES[next(iter(of_optimizer.values()))["measure"]]
    finals = {lr: report["final_measure"] for lr, report in of_optimizer.items()}
    best = measure.best(list(finals.values()))
    return next(lr for lr, final in finals.items() if final == best)


def print_sweep(reports: dict[Trial, dict[str, Any]], console: Console | None = None) -> None:
    """One row for each optimizer and learning rate; medians go over its seeds.

    ``state`` is the largest share of AdamW's that the low-rank matrices had in any of the runs.
    """
    measure = next(iter(reports.values()))["measure"]
    table = Table(
        box=box.SIMPLE, padding=(0, 1, 0, 0)
    )  # a terminal's 80 columns are just enough for three seeds
    for name in ("optimizer", "lr", measure, "median", "accuracy", "rank", "state", "s/step"):
        table.add_column(name, no_wrap=True)
    for optimizer, lr in dict.fromkeys((trial.optimizer, trial.lr) for trial in reports):
        runs = [r for t, r in reports.items() if (t.optimizer, t.lr) == (optimizer, lr)]
        finals = [run["final_measure"] for run in runs]
        accuracies = [run["final_measures"].get("accuracy") for run in runs]
        table.add_row(
            runs[0]["optimizer"],
            lr,
            " ".join(f"{value:.3f}" for value in finals),
            f"{median(finals):.3f}",
            "-" if None in accuracies else f"{median(accuracies):.3f}",
            _rank(runs),
            _low_rank_share(runs),
            f"{median(run['seconds_per_step'] for run in runs):.2f}",
        )
    (console or Console()).print(table)


def _rank(runs: Sequence[dict[str, Any]]) -> str:
    ranks = [run["mean_rank"] for run in runs]
    return "-" if None in ranks else f"{median(ranks):.1f}"


def _low_rank_share(runs: Sequence[dict[str, Any]]) -> str:
    shares = [
        run["low_rank_state_bytes"] / run["low_rank_adamw_bytes"]
        for run in runs
        if run["low_rank_adamw_bytes"]
    ]
    return f"{100 * max(shares):.0f} %" if shares else "-"
