"""Runs scripts in processes forked from one that has imported all that they need.

What a script does is the same; its start, the greater part of most launches, is paid once for the
whole test run. A launcher is a script as well: what it starts are fresh processes. What only these
show stays with them: what launchers put into the environment, how they end processes, the order of
imports, the interpreter's end, and hash seeds that differ from process to process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from tests.patience import patient

GRACE_SECONDS = 3
"""How long the others may take to end once one has failed."""

FORKS = not torch.accelerator.is_available()
"""Whether processes are forked; what they would inherit of a GPU's driver is of no use to them, so
that each is a fresh one there."""

context = multiprocessing.get_context("forkserver" if FORKS else "spawn")
context.set_forkserver_preload(["pytest", "tests.launch.imported"])


def run_forked(
    words: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    *,
    folder: Path,
    seconds: float,
) -> subprocess.CompletedProcess[str]:
    """Runs a script in as many processes as there are environments.

    Args:
        words: the script and its arguments.
        environments: all variables of each process.
        folder: where they work.
        seconds: time limit, from when all have been started.

    Returns:
        What all have printed together, and the exit code of the first that failed, or 0.

    Raises:
        AssertionError: they were not done in time; all have been ended.
    """
    with tempfile.TemporaryDirectory(prefix="forked-") as directory:
        out, err = Path(directory, "out"), Path(directory, "err")
        out.touch()
        err.touch()
        processes = [
            context.Process(target=_run, args=(list(words), dict(each), folder, out, err))
            for each in environments
        ]
        try:
            for process in processes:
                process.start()
            code = _first_failure(processes, time.monotonic() + patient(seconds))
        finally:
            for process in processes:
                _end(process)
        printed, told = out.read_text(), err.read_text()
    if code is None:
        raise AssertionError(
            f"{words[0]} was not done after {seconds} s:\n{printed[-2000:]}\n{told[-4000:]}"
        )
    return subprocess.CompletedProcess(words, code, printed, told)


def _first_failure(processes: Sequence[BaseProcess], deadline: float) -> int | None:
    """The exit code of the process that failed first, 0 if none did, None after the deadline."""
    waiting, code = {process.sentinel: process for process in processes}, 0
    while waiting:
        ended = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            return code or None
        for sentinel in ended:
            process = waiting.pop(sentinel)
            process.join()
            if process.exitcode and not code:
                code = process.exitcode
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return code


def _end(process: BaseProcess) -> None:
    """Ends a process, if it was started, and all that it has started."""
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # it may not have a group of its own yet
        process.join()


def _run(words: list[str], variables: dict[str, str], folder: Path, out: Path, err: Path) -> None:
    os.setsid()
    for descriptor, path in enumerate((os.devnull, out, err)):
        opened = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(opened, descriptor)  # in which a program that is started in its turn has it, too
        if opened != descriptor:
            os.close(opened)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    runpy.run_path(words[0], run_name="__main__")
