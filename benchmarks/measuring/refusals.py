"""Notes below a table on why optimizers have no figures, each reason once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.measuring.results import NOT_POSSIBLE

Samples = Sequence[Mapping[str, Any]]


def of_steps(samples: Samples) -> list[str]:
    """Notes for timed steps, whose samples have the reasons by optimizer in ``not_possible``."""
    return _told(
        (f"{name}, {sample.get('dtype', 'fp32')} on {sample['device']}", why)
        for sample in samples
        for name, why in sample["not_possible"].items()
    )


def of_jobs(samples: Samples) -> list[str]:
    """Notes for jobs of one optimizer each, whose ``reason`` is None if it ran."""
    return _told(
        (f"{sample['optimizer']} under {sample.get('engine', 'none')}", sample["reason"])
        for sample in samples
        if sample["reason"]
    )


def _told(reasons: Iterable[tuple[str, str]]) -> list[str]:
    return list(dict.fromkeys(f"{who}, {NOT_POSSIBLE}: {why}." for who, why in reasons))
