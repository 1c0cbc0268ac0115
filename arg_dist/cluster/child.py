"""The launcher as a child of this process: signals go to it, its exit code is ours."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import FrameType

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
KILL_SECONDS = 45.0
"""Launchers give their processes 30 s to end before they kill them."""


class Child:
    """A launcher, and the processes that it starts.

    It has a process group of its own, so that a Ctrl-C reaches it once, from here.
    """

    def __init__(
        self, words: Sequence[str], environment: Mapping[str, str], *, through: bool
    ) -> None:
        """Starts it.

        Args:
            words: the command.
            environment: all of its variables.
            through: whether signals go to its children: DeepSpeed's outer process would die of
                them, and leave its children alone.
        """
        self._process = subprocess.Popen(words, env=environment, process_group=0)
        self._through = through
        self.signals = 0

    def forward_signals(self) -> None:
        """From now on signals to this process go to the launcher."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def exit_code(self) -> int | None:
        """As a shell tells it; None while it runs."""
        code = self._process.poll()
        return None if code is None else code if code >= 0 else 128 - code

    def terminate(self) -> None:
        """Ends it and all it has started, by force if it does not end by itself."""
        everyone = self._family()
        self._send(signal.SIGTERM)
        deadline = time.monotonic() + KILL_SECONDS
        while self.exit_code() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in {*everyone, *self._family()}:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self._process.pid)
            return [launcher, *launcher.children(recursive=True)]
        return []

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.signals += 1
        self._send(number)

    def _send(self, number: int) -> None:
        targets = [self._process.pid]
        if self._through:
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(self._process.pid).children()
                targets = [child.pid for child in children] or targets
        for target in targets:
            with contextlib.suppress(ProcessLookupError):
                if self._process.poll() is None:
                    os.kill(target, number)
