"""Jobs on hosts of :mod:`tests.hosts.namespaces`: started, waited for, read."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.hosts.namespaces import Host, network, obstacle
from tests.launch.launching import ROOT, environment
from tests.patience import patient

AGENT_ENDS = 30.0
"""Seconds for a launcher to end on a busy machine once its last process has."""

reason = functools.cache(obstacle)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[tuple[Host, ...]]:
    """So many hosts for a test, which is skipped where the machine can have none."""
    if (why := reason()) is not None:
        pytest.skip(f"no hosts here: {why}")
    with network(count) as members:
        yield members


def run_python(*words: object, folder: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    """What the interpreter does and says that is given these words, with the package at hand."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env={**environment(), "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=patient(seconds),
        check=False,
    )


def told_without_root(code: str, folder: Path) -> str:
    """What a Python program says on stderr, which ends with 2 where it cannot be used, if it asks
    who it is and is told of somebody else than root.

    Args:
        code: the program; somebody else could not even read its interpreter in root's home.
        folder: where it runs.
    """
    nobody = "import os; os.geteuid = lambda: 65534\n"
    finished = run_python("-c", nobody + code, folder=folder, seconds=60)
    assert finished.returncode == 2, finished.stderr
    return finished.stderr


class Node:
    """A command that is running in a host, and what it has printed so far.

    Args:
        host: where it runs.
        words: the command line.
        log: a new file for what it prints.
        variables: set beside those of every launch.
        folder: where it works.
    """

    def __init__(
        self,
        host: Host,
        words: Sequence[object],
        log: Path,
        *,
        variables: Mapping[str, str] | None = None,
        folder: Path = ROOT,
    ) -> None:
        self.host = host
        self.log = log
        self.began = time.monotonic()
        own = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(variables or {})}
        with log.open("wb") as output:
            self.process = host.start(
                words, output=output, environment={**environment(), **own}, folder=folder
            )

    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def ends(self, *, seconds: float) -> int:
        """Its exit code; fails with what it has printed if it takes longer than `seconds`."""
        try:
            return self.process.wait(timeout=patient(seconds))
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.host.hostname} runs after {seconds} s:\n{self.printed()[-6000:]}")

    def says(self, text: str, *, seconds: float) -> None:
        """Waits until it has printed `text`; fails at once if it ends without."""
        self.wait(lambda: text in self.printed(), f"{text!r}", seconds=seconds)

    def wait(self, condition: Callable[[], bool], what: str, *, seconds: float) -> None:
        """Waits for `condition`; fails after `seconds`, or if the command ends before."""
        deadline = time.monotonic() + patient(seconds)
        while True:
            ended = self.process.poll()
            if condition():
                return
            late = time.monotonic() > deadline
            if ended is not None or late:
                state = "runs still" if ended is None else f"ended with {ended}"
                pytest.fail(
                    f"no {what} from {self.host.hostname}, which {state}:\n{self.printed()[-6000:]}"
                )
            time.sleep(0.05)
