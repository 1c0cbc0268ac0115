"""Settings passed to every run of a comparison, for any kind of training."""

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
        data: path of the data a run reads, if not in `job`.
        identity: everything that determines a result, except method, learning rate and seed.
        measure: the measure that ranks runs.
    """

    job: dict[str, Any]
    data: str
    identity: dict[str, Any]
    measure: Measure


def deciding_versions() -> dict[str, Any]:
    """Versions of the packages all runs use, for the identity; methods report their own."""
    found = versions()
    return {name: found[name] for name in ("python", "torch", "transformers")}
