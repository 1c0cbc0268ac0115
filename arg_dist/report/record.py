"""One run's files, from its first step to its last."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from arg_dist.report.charts import draw_report
from arg_dist.report.files import PICTURE, REPORT, MetricsLog, write_json
from arg_dist.report.summary import RunFacts, summarize
from arg_dist.report.tables import print_summary
from arg_dist.telemetry import OptimizerSample


class RunRecord:
    """Writes ``metrics.jsonl`` while the run goes on, and its report however it ends.

    As a context manager: an error inside leaves a report with the status ``failed``.

    Args:
        directory: where the files go; an earlier run's are replaced.
        active: False on all processes but the first, which then only pass through.
        resumed_at: the step that the run goes on from; earlier ones keep their lines.
    """

    def __init__(
        self,
        directory: Path,
        facts: RunFacts,
        *,
        planned_steps: int,
        active: bool,
        resumed_at: int = 0,
    ) -> None:
        self._directory = directory
        self._facts = facts
        self._planned_steps = planned_steps
        self._log = MetricsLog(directory, resumed_at) if active else None
        self._earlier_steps = len(self._log.lines) if self._log else 0
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
        """Writes one step; `sample` adds the ranks and energies where the optimizer was asked."""
        if sample is not None:
            self._sample = sample
            # Ranks fall as well as rise; what must fit into memory is the most there ever was.
            shares = (self._largest_share, sample.largest_share)
            self._largest_share = max((share for share in shares if share), default=None)
            self._low_rank_bytes = max(self._low_rank_bytes, sample.low_rank_bytes)
            if sample.ranks:
                line = line | {"ranks": sample.ranks, "energy": sample.energy}
        if self._log:
            self._log.append(line)

    @property
    def mean_rank(self) -> float | None:
        """The mean rank at the last sample."""
        return self._sample.mean_rank

    def finish(self, status: str) -> None:
        """Writes ``report.json`` and ``report.png`` and prints the table."""
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
        )
        write_json(self._directory / REPORT, report)
        draw_report(report, steps, self._directory / PICTURE)
        print_summary(report, str(self._directory / REPORT))
