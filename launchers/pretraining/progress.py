"""A training run's progress: a live line in the terminal, plain lines in a log file."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from launchers.reporting import MEASURES, measured


class TrainingProgress:
    """Shows each step as it completes; `shown` is False on all processes but the first.

    A resumed run has completed `done` of the `steps`. Without a terminal (a log file, a test) only
    evaluated steps are printed.
    """

    def __init__(self, steps: int, *, shown: bool, done: int = 0) -> None:
        console = Console()
        self._shown = shown
        self._live = console.is_terminal
        self._smoothed, self._seen = 0.0, 0
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and self._live),
        )
        self._task = self._bar.add_task("", total=steps, completed=done, values="starting")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, lines: Iterable[str]) -> None:
        """Prints `lines` above the live one."""
        for line in lines if self._shown else ():
            self._bar.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def show(self, line: dict[str, Any], mean_rank: float | None) -> None:
        """Shows a step's line of ``metrics.jsonl`` and the latest mean rank."""
        if not self._shown:
            return
        # Single-step losses are noisy; show the trend.
        self._seen += 1
        self._smoothed += (line["loss"] - self._smoothed) * max(0.1, 1 / self._seen)
        values = f"loss {self._smoothed:.3f}  lr {line['lr']:.2e}  {line['seconds']:.2f} s/step"
        if mean_rank is not None:
            values += f"  rank {mean_rank:.1f}"
        self._bar.update(self._task, completed=line["step"], values=values)
        if found := measured(line):
            numbers = (f"{MEASURES[key].title} {value:.4f}" for key, value in found.items())
            text = f"step {line['step']}: {', '.join(numbers)}"
            self._bar.console.print(
                text if self._live else f"{text}, {values}", highlight=False, soft_wrap=True
            )
