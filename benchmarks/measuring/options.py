"""Options that several benchmarks have."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from arg_dist.cli.parsing import OneLineParser, at_least
from arg_dist.planning.llama import LLAMA_SIZES
from benchmarks.measuring.engines import ENGINES


def parser(description: str | None) -> OneLineParser:
    """A command line that `description` tells of."""
    return OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_timed(
    command: argparse.ArgumentParser, able: Sequence[str], methods: Sequence[str]
) -> None:
    """Those of steps that are timed: `methods` of those that are `able`, shapes, ranks, rounds."""
    _shared(command, able, methods)
    add = command.add_argument
    add("--models", nargs="+", choices=LLAMA_SIZES, default=["350m"], metavar="SIZE",
        help=f"whose shapes are taken: {', '.join(LLAMA_SIZES)} (default: 350m)")  # fmt: skip
    add("--ranks", nargs="+", type=at_least(1), default=[128], metavar="RANK",
        help="(default: 128)")  # fmt: skip
    add("--rounds", type=at_least(1), default=9, help="(default: 9)")


def add_trained(
    command: argparse.ArgumentParser,
    able: Sequence[str],
    methods: Sequence[str],
    *,
    engines: Sequence[str],
    model: str,
) -> None:
    """Those of training jobs: `methods` of those that are `able`, `engines`, `model`, batch."""
    _shared(command, able, methods)
    known = [name for name in ENGINES if name in engines or name != "none"]
    add = command.add_argument
    add("--model", choices=LLAMA_SIZES, default=model, metavar="SIZE",
        help=f"of {', '.join(LLAMA_SIZES)} (default: {model})")  # fmt: skip
    add("--rank", type=at_least(1), help="of low-rank methods (default: a quarter of the width)")
    add("--engines", nargs="*", choices=known, default=list(engines), metavar="ENGINE",
        help=f"of {', '.join(known)} (default: {' '.join(engines)})")  # fmt: skip
    add("--batch-size", type=at_least(1), default=1, help="sequences of a process (default: 1)")
    add("--seq-len", type=at_least(2), default=256, help="tokens per sequence (default: 256)")
    add("--steps", type=at_least(2), default=5, help="of a training job (default: 5)")
    add("--limit", type=at_least(1), default=600, metavar="SECONDS", help="for one job "
        "(default: 600)")  # fmt: skip


def _shared(command: argparse.ArgumentParser, able: Sequence[str], methods: Sequence[str]) -> None:
    add = command.add_argument
    add("--methods", nargs="+", choices=able, default=list(methods), metavar="METHOD",
        help=f"of {', '.join(able)} (default: {' '.join(methods)})")  # fmt: skip
    add("--device", metavar="DEVICE", help="(default: a GPU if there is one)")
    add_kept(command)


def add_kept(command: argparse.ArgumentParser) -> None:
    """Threads, and where figures are kept."""
    add = command.add_argument
    add("--threads", type=at_least(1), help="of torch on the CPU (default: its own choice)")
    add("--out", type=Path, metavar="FILE.json", help="all figures; FILE.md: the tables")
