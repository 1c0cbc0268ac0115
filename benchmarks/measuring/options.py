"""Options shared by several benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from arg_dist.cli.parsing import OneLineParser, at_least
from arg_dist.planning.llama import LLAMA_SIZES
from benchmarks.measuring.engines import ENGINES


def parser(description: str | None) -> OneLineParser:
    """A parser whose help shows `description` verbatim."""
    return OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_timed(
    command: argparse.ArgumentParser, able: Sequence[str], methods: Sequence[str]
) -> None:
    """Add the options of timed steps.

    Args:
        command: the parser.
        able: methods to choose from.
        methods: the default methods.
    """
    _shared(command, able, methods)
    add = command.add_argument
    add("--models", nargs="+", choices=LLAMA_SIZES, default=["350m"], metavar="SIZE",
        help=f"models whose matrix shapes are timed: {', '.join(LLAMA_SIZES)} "
        "(default: 350m)")  # fmt: skip
    add("--ranks", nargs="+", type=at_least(1), default=[128], metavar="RANK",
        help="ranks of the low-rank methods (default: 128)")  # fmt: skip
    add("--rounds", type=at_least(1), default=9, help="timed rounds (default: 9)")


def add_trained(
    command: argparse.ArgumentParser,
    able: Sequence[str],
    methods: Sequence[str],
    *,
    engines: Sequence[str],
    model: str,
) -> None:
    """Add the options of training jobs.

    Args:
        command: the parser.
        able: methods to choose from.
        methods: the default methods.
        engines: the default engines.
        model: the default model.
    """
    _shared(command, able, methods)
    known = [name for name in ENGINES if name in engines or name != "none"]
    add = command.add_argument
    add("--model", choices=LLAMA_SIZES, default=model, metavar="SIZE",
        help=f"one of {', '.join(LLAMA_SIZES)} (default: {model})")  # fmt: skip
    add("--rank", type=at_least(1), help="rank of the low-rank methods (default: a quarter of the "
        "hidden size)")  # fmt: skip
    add("--engines", nargs="*", choices=known, default=list(engines), metavar="ENGINE",
        help=f"any of {', '.join(known)} (default: {' '.join(engines)})")  # fmt: skip
    add("--batch-size", type=at_least(1), default=1, help="sequences per process (default: 1)")
    add("--seq-len", type=at_least(2), default=256, help="tokens per sequence (default: 256)")
    add("--steps", type=at_least(2), default=5, help="steps of a training job (default: 5)")
    add("--limit", type=at_least(1), default=600, metavar="SECONDS", help="time limit of one job "
        "(default: 600)")  # fmt: skip


def _shared(command: argparse.ArgumentParser, able: Sequence[str], methods: Sequence[str]) -> None:
    add = command.add_argument
    add("--methods", nargs="+", choices=able, default=list(methods), metavar="METHOD",
        help=f"any of {', '.join(able)} (default: {' '.join(methods)})")  # fmt: skip
    add("--device", metavar="DEVICE", help="torch device (default: a GPU if available, else cpu)")
    add_kept(command)


def add_kept(command: argparse.ArgumentParser) -> None:
    """Add ``--threads`` and ``--out``."""
    add = command.add_argument
    add("--threads", type=at_least(1), help="torch CPU threads (default: torch's)")
    add("--out", type=Path, metavar="FILE.json", help="write all figures to FILE.json and the "
        "tables to FILE.md")  # fmt: skip
