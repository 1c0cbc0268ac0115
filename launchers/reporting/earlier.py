"""What a run that goes on from a checkpoint has behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers.reporting.files import METRICS, read_metrics


@dataclass(frozen=True)
class Earlier:
    """The run up to the checkpoint that it goes on from; without one, nothing.

    Attributes:
        step: of the checkpoint; lines of later steps are cut off.
        directory: of the run that wrote the checkpoint; None for the run's own.
        last_line: of that step, should the run have been killed before it could write it.
        seconds: that training has taken.
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
            ValueError: a line of the file, other than its last, is no JSON.
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
