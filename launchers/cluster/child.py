"""The launcher as a child process: it receives this process's signals and sets its exit code."""

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
"""Launchers give their processes 30 s to terminate before they kill them."""
IDLE_SECONDS = 3.0
"""For a launcher without processes: while the network is down, torchrun waits for a minute."""
LEFT_SECONDS = 5.0
"""For orphaned processes to terminate; no launcher waits for them any longer."""
END_SECONDS = 1.0
"""For processes to exit by themselves after their launcher has exited."""
PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans(yes: bool = True) -> None:
    """Makes this process adopt orphaned descendants from now on (Linux).

    So the processes of a killed launcher are found, whatever session or group they are in.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0)


class Child:
    """A launcher and the processes that it starts.

    It has its own process group, so that a Ctrl-C reaches it only once, through this process.
    """

    def __init__(
        self, words: Sequence[str], environment: Mapping[str, str], *, through: bool
    ) -> None:
        """Starts it.

        Args:
            words: the command line.
            environment: all of its variables.
            through: whether signals go to its children instead: DeepSpeed's outer process would
                die of them and orphan its children.
        """
        self._others = set(psutil.Process().children(recursive=True))
        self._process = subprocess.Popen(words, env=environment, process_group=0)
        self._through = through
        self.signals = 0

    def forward_signals(self) -> None:
        """Forwards signals to the launcher from now on."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def exit_code(self) -> int | None:
        """The exit code as a shell reports it; None while the launcher runs."""
        code = self._process.poll()
        return None if code is None else code if code >= 0 else 128 - code

    def terminate(self) -> None:
        """Terminates the launcher and all its processes, and kills those that remain."""
        everyone = self._family()
        self._send(signal.SIGTERM)
        now = time.monotonic()
        deadline, idle_until = now + KILL_SECONDS, now + IDLE_SECONDS
        while self.exit_code() is None and now < min(deadline, idle_until):
            time.sleep(0.1)
            now = time.monotonic()
            if len(self._family()) > 1:  # more than the launcher itself
                idle_until = now + IDLE_SECONDS
        if self.exit_code() is None:
            self._process.kill()
            self._process.wait()
        self.sweep(everyone)

    def sweep(self, known: Sequence[psutil.Process] = ()) -> int:
        """Terminates the remaining processes of the launcher; returns how many there were.

        Args:
            known: some of them, which may no longer be reachable through their parents.
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
        """The launcher and its descendants that are running."""
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
