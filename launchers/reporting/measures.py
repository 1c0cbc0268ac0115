"""The measures on held-out data by which runs are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LOSS = "held_out_loss"
"""Key of the measure that every run has."""


@dataclass(frozen=True)
class Measure:
    """One number of an evaluation, under `key` in the lines of ``metrics.jsonl``."""

    key: str
    title: str
    lower_is_better: bool = False

    def best(self, values: Sequence[float]) -> float | None:
        """The best of `values`; None if there are none."""
        return (min if self.lower_is_better else max)(values, default=None)


MEASURES = {
    measure.key: measure
    for measure in (
        Measure("matthews", "Matthews correlation"),
        Measure("accuracy", "accuracy"),
        Measure("f1", "F1"),
        Measure(LOSS, "held-out loss", lower_is_better=True),
    )
}


def measured(line: dict[str, Any]) -> dict[str, float]:
    """The held-out measures among the numbers of `line`."""
    return {key: line[key] for key in MEASURES if line.get(key) is not None}


def judging(reports: Sequence[dict[str, Any]]) -> Measure:
    """The measure by which all of `reports` are judged; the loss if they differ."""
    keys = {report.get("measure", LOSS) for report in reports}
    return MEASURES[keys.pop() if len(keys) == 1 else LOSS]
