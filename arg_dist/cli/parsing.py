"""Shared by all command lines: one-line errors, reported once per job, and option types."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

FAILED, BAD_INPUT = 1, 2
"""Exit codes."""

PATIENCE = 8.0
"""Seconds; the start of processes on a busy machine can be staggered by this much."""


class InputError(ValueError):
    """Invalid user input; the message is the one line printed for the user."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports an invalid option in one line, once per job."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit the process."""
        complain(message)
        sys.exit(BAD_INPUT)


def complain(message: str) -> None:
    """Print `message`, prefixed with the script's name, to stderr once per job.

    The first process prints at once. Launchers terminate all processes as soon as one exits, so the
    others wait to be terminated; an error that occurs only on them is printed after
    :data:`PATIENCE`.
    """
    if not is_first_process():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # let the launcher terminate this process
        time.sleep(PATIENCE)
    print(f"{Path(sys.argv[0]).stem}: {message}", file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Whether this process reports on behalf of the job; needs no process group."""
    return int(os.environ.get("RANK", 0)) == 0


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: integers of at least `least`."""

    def whole_number(text: str) -> int:
        if not (text.isdecimal() and int(text) >= least):
            raise argparse.ArgumentTypeError(
                f"expected an integer of at least {least}, got {text!r}"
            )
        return int(text)

    return whole_number


def share(text: str) -> float:
    """An argparse type: numbers from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return number


def not_negative(text: str) -> float:
    """An argparse type: finite numbers of at least 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return number


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """Parse ``["energy=0.8", "side=left"]`` into a dict; values are JSON, else plain strings.

    Raises:
        InputError: an assignment has no ``=``.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not (key and equals):
            raise InputError(f"--set {assignment}: expected key=value")
        try:
            overrides[key] = json.loads(value)
        except ValueError:
            overrides[key] = value
    return overrides
