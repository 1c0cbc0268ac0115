"""All that a GPU can tell of the optimizer in nine minutes.

    python -m benchmarks.gpu --out runs/gpu.json
    python -m benchmarks.gpu --device cpu --small      # tries the benchmark itself

parity     the CPU and the GPU train the same matrices
ceilings   speed of the memory, and of the products of a step
launches   operators, kernels and waits of a step
steps      a step of a whole model against fused AdamW: time and memory
refreshes  the parts of a refresh
lists      the kernels for lists of matrices against PyTorch
messages   NCCL with one process, and with two on one GPU; gloo on a CPU
training   a model, by AdamW and by the optimizer

Each section runs in a process of its own and within its time; one that fails or hangs is reported,
and the others still run. The files are written after each: FILE.json with all samples, FILE.md with
the tables.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from arg_dist.cli.parsing import InputError, OneLineParser, at_least
from benchmarks.gpu.child import run_in_child
from benchmarks.gpu.plan import LIMIT, SECTIONS
from benchmarks.gpu.sections import (
    FULL,
    SKIPPED,
    SMALL,
    Outcome,
    Section,
    Setting,
    figures_of,
    run_here,
)
from benchmarks.measuring.cli import run, run_and_exit
from benchmarks.measuring.options import add_kept, parser
from benchmarks.measuring.results import Figures, write

LEAST = 1 / 3
"""Share of its time that must be left for a section to begin."""

tell = partial(print, file=sys.stderr, flush=True)


def measure_sections(
    sections: Sequence[Section],
    setting: Setting,
    out: Path,
    *,
    limit: float,
    threads: int | None = None,
    in_process: bool = False,
) -> list[Figures]:
    """Run the sections one after the other, and write the tables after each.

    Args:
        sections: the sections.
        setting: where they run, and how much they measure.
        out: the JSON file.
        limit: seconds for all of them together.
        threads: torch threads of their processes; None for torch's default.
        in_process: run them in this process, where no section can be interrupted.
    """
    deadline, tables = time.monotonic() + limit, []
    for section in sections:
        left = deadline - time.monotonic()
        seconds = min(section.seconds * setting.patience, left)
        if seconds < LEAST * section.seconds:
            needs = f"{max(0, left):.0f} s of {limit:g} are left, and it may take"
            outcome = Outcome(SKIPPED, reason=f"{needs} {section.seconds:g}")
        elif in_process:
            outcome = run_here(section, setting, time.time() + seconds)
        else:
            outcome = run_in_child(section, setting, seconds, threads)
        tell(f"{section.name}: {outcome.line()}")
        tables.append(figures_of(section, outcome))
        write(tables, out)
    return tables


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, or 2 if it is invalid."""
    return run(_options(), _measured, arguments)


def _options() -> OneLineParser:
    command = parser(__doc__)
    add = command.add_argument
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION",
        help=f"any of {', '.join(SECTIONS)} (default: all)")  # fmt: skip
    add("--device", metavar="DEVICE", help="torch device (default: a GPU if available, else cpu)")
    add("--small", action="store_true", help="tiny sizes, in which figures mean nothing")
    add("--limit", type=at_least(1), default=LIMIT, metavar="SECONDS", help="time limit of all "
        f"sections together (default: {LIMIT})")  # fmt: skip
    add("--in-process", action="store_true", help="run the sections in this process: an error of "
        "the device is then that of all further ones")  # fmt: skip
    add_kept(command)
    command.set_defaults(out=Path("runs/gpu.json"))
    return command


def _measured(options: argparse.Namespace, device: torch.device) -> list[Figures]:
    if device.type == "cpu" and not options.small:
        raise InputError(
            f"--device {device}: the sizes are those for a GPU, and take hours on a CPU; pass "
            "--small to try the benchmark itself"
        )
    return measure_sections(
        [SECTIONS[name] for name in options.sections],
        Setting(device, SMALL if options.small else FULL),
        options.out,
        limit=float(options.limit),
        threads=options.threads,
        in_process=options.in_process,
    )


if __name__ == "__main__":
    run_and_exit(main)
