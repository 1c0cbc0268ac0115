"""The record of a training run: metrics by step, a report, a chart, a table, a comparison.

A run directory holds ``metrics.jsonl`` (one line per step), ``report.json`` and ``report.png``.
``python -m launchers.reporting compare RUN_DIR...`` compares several runs.
"""

from arg_dist.telemetry import OptimizerSample, sample_optimizer
from launchers.reporting.earlier import Earlier
from launchers.reporting.files import read_metrics, read_report
from launchers.reporting.measures import MEASURES, measured
from launchers.reporting.record import RunRecord
from launchers.reporting.summary import RunFacts, run_facts, summarize

__all__ = [
    "MEASURES",
    "Earlier",
    "OptimizerSample",
    "RunFacts",
    "RunRecord",
    "measured",
    "read_metrics",
    "read_report",
    "run_facts",
    "sample_optimizer",
    "summarize",
]
