"""Why optimizers have no numbers: the sentences below a table, each reason once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.measuring.results import NOT_POSSIBLE

Samples = Sequence[Mapping[str, Any]]


def of_steps(samples: Samples) -> list[str]:
    """Of samples of timed steps, whose ``not_possible`` has the reasons by optimizer."""
    return _told(
        (f"{name}, {sample.get('dtype', 'fp32')} on {sample['device']}", why)
        for sample in samples
        for name, why in sample["not_possible"].items()
    )


def of_jobs(samples: Samples) -> list[str]:
    """Of samples of jobs, each of one optimizer, whose ``reason`` is None where it was possible."""
    return _told(
        (f"{sample['optimizer']} under {sample.get('engine', 'none')}", sample["reason"])
        for sample in samples
        if sample["reason"]
    )


def _told(reasons: Iterable[tuple[str, str]]) -> list[str]:
    return list(dict.fromkeys(f"{who}, {NOT_POSSIBLE}: {why}." for who, why in reasons))
