"""The files of a run directory, written so that a reader never sees a partial one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arg_dist.checkpoint.files import write_atomically

METRICS = "metrics.jsonl"
REPORT = "report.json"
PICTURE = "report.png"


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as JSON, which lacks NaN and infinity (null) and many types (text)."""
    text = json.dumps(_finite(content), indent=2, allow_nan=False, default=str) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    if callable(getattr(content, "tolist", None)):  # NumPy's and torch's numbers
        return _finite(content.tolist())
    return content


class MetricsLog:
    """Appends one JSON line per step to ``metrics.jsonl`` and keeps them for the report.

    Each line is flushed to the operating system, so a killed run keeps all its finished steps. The
    file begins with the lines `earlier`; its previous contents are replaced.
    """

    def __init__(self, directory: Path, earlier: Sequence[dict[str, Any]] = ()) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for stale in (REPORT, PICTURE):  # an earlier run's would appear to match these metrics
            (directory / stale).unlink(missing_ok=True)
        self.lines = list(earlier)
        text = "".join(map(_json_line, self.lines))
        # atomic, so that not even a crash can lose the earlier lines
        write_atomically(directory / METRICS, lambda temporary: temporary.write_text(text))
        self._file = open(directory / METRICS, "a")  # noqa: SIM115 - open for the whole run

    def append(self, line: dict[str, Any]) -> None:
        """Writes one step; measures that were not taken are absent."""
        line = _finite(line)
        self.lines.append(line)
        self._file.write(_json_line(line))
        self._file.flush()

    def close(self) -> None:
        """Closes the file; `lines` stays available."""
        self._file.close()


def _json_line(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False, default=str) + "\n"


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The steps of a run; a last line that a crash has truncated is ignored."""
    lines = (directory / METRICS).read_text().splitlines()
    steps = []
    for number, line in enumerate(lines, start=1):
        try:
            steps.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise
    return steps


def read_report(directory: Path) -> dict[str, Any]:
    """The ``report.json`` of a run."""
    return json.loads((directory / REPORT).read_text())
