"""The record of a training run: metrics by step, a report, a picture, a table, a comparison.

A run directory holds ``metrics.jsonl`` (one line per step), ``report.json`` and ``report.png``.
``python -m arg_dist.report compare RUN_DIR...`` puts several runs side by side.
"""

from arg_dist.report.earlier import Earlier
from arg_dist.report.files import read_metrics, read_report
from arg_dist.report.measures import MEASURES, measured
from arg_dist.report.record import RunRecord
from arg_dist.report.summary import RunFacts, run_facts, summarize
from arg_dist.telemetry import OptimizerSample, sample_optimizer

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
