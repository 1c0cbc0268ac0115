"""What command lines share: mistakes reported in one line, once for all processes; option types."""

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
"""Seconds; the processes of a busy machine start that far apart."""


class InputError(ValueError):
    """What the user gave cannot be used; the message is the one line that the user reads."""


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong option in one line, once for all processes."""

    def error(self, message: str) -> NoReturn:
        """Prints `message` and ends the process."""
        complain(message)
        sys.exit(BAD_INPUT)


def complain(message: str) -> None:
    """Prints `message` after the script's name on stderr, once for all processes.

    The first process speaks. A launcher ends all processes as soon as one has ended, so the others
    wait until they are; what only they have met, they tell after :data:`PATIENCE` themselves.
    """
    if not is_first_process():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's: the first one has spoken
        time.sleep(PATIENCE)
    print(f"{Path(sys.argv[0]).stem}: {message}", file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Whether this process speaks for the job; valid before process groups exist, too."""
    return int(os.environ.get("RANK", 0)) == 0


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from `least` on."""

    def whole_number(text: str) -> int:
        if not (text.isdecimal() and int(text) >= least):
            raise argparse.ArgumentTypeError(
                f"a whole number of at least {least} is needed, got {text!r}"
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
        raise argparse.ArgumentTypeError(f"a number from 0 to 1 is needed, got {text!r}")
    return number


def not_negative(text: str) -> float:
    """An argparse type: numbers from 0 on."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"a number of at least 0 is needed, got {text!r}")
    return number


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """``["energy=0.8", "side=left"]`` as a dict; values are JSON, or else the text itself.

    Raises:
        InputError: an assignment has no ``=``.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not (key and equals):
            raise InputError(f"--set {assignment}: key=value is needed")
        try:
            overrides[key] = json.loads(value)
        except ValueError:
            overrides[key] = value
    return overrides
