"""The launcher as a child of this process: signals go to it, its exit code is ours."""

from __future__ import annotations

import contextlib
import ctypes
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
IDLE_SECONDS = 3.0
"""For a launcher without processes: where the network is down, torchrun's waits for a minute."""
LEFT_SECONDS = 5.0
"""For processes that a launcher has left; who waits for them is gone."""
END_SECONDS = 1.0
"""For processes that are about to end by themselves, when their launcher has."""
PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans(yes: bool = True) -> None:
    """From now on processes whose parents were killed become children of this one (Linux).

    So those of a launcher that was killed are found, wherever it had put them.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0)


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
        self._others = set(psutil.Process().children(recursive=True))
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
        now = time.monotonic()
        deadline, idle_until = now + KILL_SECONDS, now + IDLE_SECONDS
        while self.exit_code() is None and now < min(deadline, idle_until):
            time.sleep(0.1)
            now = time.monotonic()
            if len(self._family()) > 1:  # others than the launcher
                idle_until = now + IDLE_SECONDS
        if self.exit_code() is None:
            self._process.kill()
            self._process.wait()
        self.sweep(everyone)

    def sweep(self, known: Sequence[psutil.Process] = ()) -> int:
        """Ends what is left of the launcher's processes; returns how many there were.

        Args:
            known: some of them; they may have lost the parent by whom others are found.
        """
        _, left = psutil.wait_procs({*known, *self._family()}, timeout=END_SECONDS)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        if not left:
            return 0
        _, alive = psutil.wait_procs(left, timeout=LEFT_SECONDS)
        for process in {*alive, *self._family()}:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return len(left)

    def _family(self) -> list[psutil.Process]:
        """The launcher and its descendants, as far as they run."""
        running = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process not in self._others and process.status() != psutil.STATUS_ZOMBIE:
                    running.append(process)
        return running

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
