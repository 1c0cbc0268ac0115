"""The history of a resumed run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers.reporting.files import METRICS, read_metrics


@dataclass(frozen=True)
class Earlier:
    """The run up to the checkpoint that it resumes from; empty without one.

    Attributes:
        step: the checkpoint's step; lines of later steps are dropped.
        directory: of the run that wrote the checkpoint; None for the run's own.
        last_line: the line of that step, in case the run was killed before writing it.
        seconds: training time so far.
        parts: where the run's parts ran, in order: first_step, engine, world_size, date, command.
    """

    step: int = 0
    directory: Path | None = None
    last_line: dict[str, Any] | None = None
    seconds: float = 0.0
    parts: list[dict[str, Any]] = field(default_factory=list)

    def lines(self, own: Path) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl`` up to the checkpoint; `own` is the run's directory.

        Raises:
            ValueError: a line of the file, other than its last, is not JSON.
        """
        directory = self.directory or own
        if not self.step:
            return []
        kept = []
        if (directory / METRICS).exists():
            kept = [line for line in read_metrics(directory) if line["step"] <= self.step]
        if self.last_line and (not kept or kept[-1]["step"] < self.step):
            kept.append(self.last_line)
        return kept
