"""The sections in their order, with the seconds that each may take."""

from __future__ import annotations

from benchmarks.gpu import (
    ceilings,
    launches,
    lists,
    messages,
    parity,
    refreshes,
    steps,
    training,
)
from benchmarks.gpu.sections import Section

LIMIT = 530
"""Seconds of the whole, by default; the sections together may take no more."""

SECTIONS = {
    section.name: section
    for section in (
        Section("parity", parity.TITLE, 60, parity.measure, parity.figures),
        Section("ceilings", ceilings.TITLE, 35, ceilings.measure, ceilings.figures),
        Section("launches", launches.TITLE, 40, launches.measure, launches.figures),
        Section("steps", steps.TITLE, 150, steps.measure, steps.figures),
        Section("refreshes", refreshes.TITLE, 40, refreshes.measure, refreshes.figures),
        Section("lists", lists.TITLE, 90, lists.measure, lists.figures),
        Section("messages", messages.TITLE, 50, messages.measure, messages.figures),
        Section("training", training.TITLE, 60, training.measure, training.figures),
    )
}
