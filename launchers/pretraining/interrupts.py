"""Ctrl-C and SIGTERM as a request to stop after the current step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from signal import Handlers
from types import FrameType


class StopRequest:
    """Records the first SIGINT or SIGTERM; a second Ctrl-C terminates the process at once.

    A process that dies inside a collective leaves the others waiting. So a signal only sets
    `signal`; the training loop exchanges it at each step, and all processes stop together.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._handle_with(self._remember)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Restores the default handlers inside, for waits that may never complete."""
        self._handle_with(signal.SIG_DFL)
        try:
            yield
        finally:
            self._handle_with(self._remember)

    def _handle_with(self, handler: Callable[[int, FrameType | None], None] | Handlers) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        # Launchers send a SIGTERM after a Ctrl-C: the first signal is the user's.
        self.signal = self.signal or number


def exit_code(number: int) -> int:
    """The shell's exit code of a process terminated by signal `number`: 130 for Ctrl-C."""
    return 128 + number
