"""A section of the benchmark: what it measures, and how it is run within its time.

A section yields its samples one by one, and knows nothing of time: whoever runs it keeps each
sample as it comes, and stops asking when the time is over.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.measuring.contenders import in_one_line
from benchmarks.measuring.results import Figures

Sample = dict[str, Any]
"""Numbers and texts, as JSON has them."""

RUNNING, FINISHED, STOPPED, FAILED, SKIPPED = "running", "finished", "stopped", "failed", "skipped"
"""States of a section; a stopped one was over its time, and has the samples until then."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        model: the size in ``LLAMA_SIZES`` whose matrices are taken.
        layers: its layers in whole steps; None for all.
        profiled_layers: its layers where launches are counted.
        vocabulary: its tokens.
        rank: constant rank of whole steps.
        ranks: ranks of single products, the most important first.
        widths: widths of sketches.
        lists: numbers of matrices that the grouped kernels get at a time.
        copied: bytes that are copied to tell the speed of the memory.
        rounds: timed calls of each function.
        shapes: of the matrices that the CPU trains, too.
        trained: the size of the model that is trained.
        steps: its steps.
        batch: its sequences per step, and their tokens.
    """

    model: str
    layers: int | None
    profiled_layers: int
    vocabulary: int
    rank: int
    ranks: tuple[int, ...]
    widths: tuple[int, ...]
    lists: tuple[int, ...]
    copied: int
    rounds: int
    shapes: tuple[tuple[int, int], ...]
    trained: str
    steps: int
    batch: tuple[int, int]


FULL = Sizes(
    model="1b",
    layers=None,
    profiled_layers=2,
    vocabulary=32000,
    rank=128,
    ranks=(128, 64, 256),
    widths=(136, 520),
    lists=(24, 8, 1),
    copied=2**30,
    rounds=5,
    shapes=((512, 512), (384, 1024), (1000, 333)),
    trained="60m",
    steps=50,
    batch=(64, 512),
)
SMALL = Sizes(
    model="pico",
    layers=1,
    profiled_layers=1,
    vocabulary=64,
    rank=8,
    ranks=(8, 4),
    widths=(12,),
    lists=(2, 1),
    copied=2**20,
    rounds=2,
    shapes=((48, 48), (32, 64), (60, 33)),
    trained="pico",
    steps=2,
    batch=(2, 16),
)
"""To try the benchmark itself."""


@dataclass(frozen=True)
class Setting:
    """Where a section runs, and how much it measures."""

    device: torch.device
    sizes: Sizes

    @property
    def patience(self) -> int:
        """Factor of time limits: on a CPU the benchmark itself is tried, beside other work."""
        return 1 if self.device.type == "cuda" else 4


@dataclass(frozen=True)
class Section:
    """A part of the benchmark.

    Attributes:
        name: its name on the command line.
        title: title of its table.
        seconds: the most that it may take, the start of its process included.
        measure: yields the samples, the most important first.
        figures: the table of the samples that there are, at least one.
    """

    name: str
    title: str
    seconds: float
    measure: Callable[[Setting], Iterable[Sample]]
    figures: Callable[[list[Sample]], Figures]


@dataclass
class Outcome:
    """What became of a section.

    Attributes:
        status: one of :data:`FINISHED` and the others.
        seconds: time that it took.
        reason: why it is not finished, in one line.
        log: the last lines of what it printed, if it failed.
        samples: what it has found.
    """

    status: str = RUNNING
    seconds: float = 0.0
    reason: str | None = None
    log: str | None = None
    samples: list[Sample] = field(default_factory=list)

    def line(self) -> str:
        """Status, time and reason."""
        why = f": {self.reason}" if self.reason else ""
        return f"{self.status} after {self.seconds:.0f} s{why}"


def run_here(
    section: Section,
    setting: Setting,
    until: float,
    keep: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Run a section in this process.

    Args:
        section: the section.
        setting: where, and how much.
        until: the time, as of ``time.time()``, after which no further sample is asked for.
        keep: called with what there is after each sample, and at the end.
    """
    began, outcome = time.monotonic(), Outcome()
    try:
        for sample in section.measure(setting):
            outcome.samples.append(sample)
            outcome.seconds = time.monotonic() - began
            keep(outcome)
            if time.time() > until:
                outcome.status = STOPPED
                outcome.reason = f"its time was over after {len(outcome.samples)} samples"
                break
        else:
            outcome.status = FINISHED
    except Exception as error:  # of whatever is measured: the other sections shall still run
        outcome.status, outcome.reason = FAILED, in_one_line(error)
        outcome.log = traceback.format_exc()
    outcome.seconds = time.monotonic() - began
    keep(outcome)
    return outcome


def figures_of(section: Section, outcome: Outcome) -> Figures:
    """The table of a section, and in its notes what became of it."""
    found = Figures(section.title, [], [])
    notes = [] if outcome.status == FINISHED else [f"{section.name}: {outcome.line()}."]
    if outcome.samples:
        try:
            found = section.figures(outcome.samples)
        except Exception as error:  # the samples are worth more than their table
            notes.append(f"{section.name}: no table of its samples: {in_one_line(error)}.")
    about = {
        "section": section.name,
        "status": outcome.status,
        "seconds": outcome.seconds,
        "reason": outcome.reason,
        "log": outcome.log,
    }
    return replace(found, notes=[*found.notes, *notes], samples=outcome.samples, about=about)
