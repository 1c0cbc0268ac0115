"""The files of one run, from its first step to its last."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from arg_dist.telemetry import OptimizerSample
from launchers.reporting.charts import draw_report
from launchers.reporting.earlier import Earlier
from launchers.reporting.files import PICTURE, REPORT, MetricsLog, write_json
from launchers.reporting.summary import RunFacts, summarize
from launchers.reporting.tables import print_summary


class RunRecord:
    """Writes ``metrics.jsonl`` during the run, and its report however the run ends.

    As a context manager: an error inside results in a report with the status ``failed``.

    Args:
        directory: where the files go; an earlier run's are replaced.
        active: False on all processes but the first; nothing is written then.
        earlier: the run up to the checkpoint that it resumes from.
    """

    def __init__(
        self,
        directory: Path,
        facts: RunFacts,
        *,
        planned_steps: int,
        active: bool,
        earlier: Earlier | None = None,
    ) -> None:
        self._directory = directory
        self._facts = facts
        self._planned_steps = planned_steps
        self._earlier = earlier or Earlier()
        lines = self._earlier.lines(directory) if active else []
        self._log = MetricsLog(directory, lines) if active else None
        self._earlier_steps = len(lines)
        self._began = time.perf_counter()
        self._sample = OptimizerSample()
        self._largest_share: float | None = None
        self._low_rank_bytes = 0
        self._finished = False

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not self._finished:
            self.finish("failed")

    def step(self, line: dict[str, Any], sample: OptimizerSample | None = None) -> None:
        """Writes one step; `sample` adds ranks and energies if the optimizer was sampled."""
        if sample is not None:
            self.observe(sample)
            line = self._with_sample(line, sample)
        if self._log:
            self._log.append(line)

    def observe(self, sample: OptimizerSample) -> None:
        """Takes the optimizer's numbers for the report."""
        self._sample = sample
        # Ranks rise and fall; the peak is what must fit into memory.
        shares = (self._largest_share, sample.largest_share)
        self._largest_share = max((share for share in shares if share), default=None)
        self._low_rank_bytes = max(self._low_rank_bytes, sample.low_rank_bytes)

    def progress(
        self, line: dict[str, Any], sample: OptimizerSample | None = None
    ) -> dict[str, Any]:
        """What a checkpoint stores for a run that resumes from it, as JSON: fields of `Earlier`.

        `line` and `sample` are those of the checkpoint's step, not yet passed to :meth:`step`.
        """
        # a copy: later entries are added to the line while the checkpoint is written
        last_line = self._with_sample(line, sample) if sample else dict(line)
        return {"last_line": last_line, "seconds": self.seconds, "parts": self.parts}

    @staticmethod
    def _with_sample(line: dict[str, Any], sample: OptimizerSample) -> dict[str, Any]:
        known = {"ranks": sample.ranks, "energy": sample.energy} if sample.ranks else {}
        return {**line, **known}

    @property
    def seconds(self) -> float:
        """Seconds of training, earlier parts included."""
        return self._earlier.seconds + time.perf_counter() - self._began

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Where each part of the run was trained, from the first to this one."""
        own = {
            "first_step": self._earlier.step + 1,
            "engine": self._facts.engine,
            "world_size": self._facts.world_size,
            "date": self._facts.date,
            "command": self._facts.command,
        }
        return [*self._earlier.parts, own]

    @property
    def mean_rank(self) -> float | None:
        """The mean rank at the last sample."""
        return self._sample.mean_rank

    def finish(self, status: str, saves: Sequence[dict[str, Any]] = ()) -> None:
        """Writes ``report.json`` and ``report.png`` and prints the table.

        `saves` are this part's checkpoints: step, stall_seconds and write_seconds (the longest of
        any process), bytes (of all processes).
        """
        self._finished = True
        if self._log is None:
            return
        self._log.close()
        steps = self._log.lines
        report = summarize(
            self._facts,
            steps,
            self._sample,
            largest_share=self._largest_share,
            low_rank_bytes=self._low_rank_bytes,
            own_steps=len(steps) - self._earlier_steps,
            status=status,
            planned_steps=self._planned_steps,
            seconds=self.seconds,
            parts=self.parts,
            saves=saves,
        )
        write_json(self._directory / REPORT, report)
        draw_report(report, steps, self._directory / PICTURE)
        print_summary(report, str(self._directory / REPORT))
