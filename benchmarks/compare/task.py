"""What every run of a comparison is told, whatever kind of training it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launchers.reporting.measures import Measure
from launchers.reporting.summary import versions


@dataclass(frozen=True)
class Task:
    """A prepared comparison.

    Attributes:
        job: the settings of every run, as JSON.
        data: where a run finds what it reads, if not in `job`.
        identity: all that decides about a result, besides method, learning rate and seed.
        measure: what judges a run.
    """

    job: dict[str, Any]
    data: str
    identity: dict[str, Any]
    measure: Measure


def deciding_versions() -> dict[str, Any]:
    """Versions of what all runs are made with, for the identity; methods tell their own."""
    found = versions()
    return {name: found[name] for name in ("python", "torch", "transformers")}
