"""Starts a job, and does to it what machines do: signals, a process that no longer answers."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import psutil

from tests.launch.launching import ROOT, Launcher, command, environment
from tests.patience import patient


def metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's ``metrics.jsonl``, which it may be writing at the moment."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + patient(seconds)
    while not condition():
        assert time.monotonic() < deadline, f"nothing came for {seconds} s"
        time.sleep(0.05)


class Started:
    """A launch that is going on: its launcher's process, and what all of them have printed."""

    def __init__(self, process: subprocess.Popen[bytes], log: TextIO) -> None:
        self.process = process
        self._log = log
        self._seen: dict[int, psutil.Process] = {}

    def printed(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def workers(self) -> list[psutil.Process]:
        """The processes that the launcher has started, by their index in the job.

        Those that were there at an earlier call are among them, should the launcher have left them.
        """
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "RANK" in (variables := child.environ()):
                        self._seen[int(variables["RANK"])] = child
        return [self._seen[index] for index in sorted(self._seen)]

    def stop(self, number: signal.Signals, *, seconds: float) -> int:
        """A signal to the launcher and its processes; its exit code once all have gone.

        The launcher may go at once: its processes have a report to write.
        """
        there = self.workers()
        os.killpg(self.process.pid, number)
        code = self.process.wait(timeout=patient(seconds))
        _, alive = psutil.wait_procs(there, timeout=patient(seconds))
        assert not alive, f"still there {seconds} s after {number.name}: {alive}"
        return code


@contextlib.contextmanager
def started(
    script: str,
    *arguments: object,
    processes: int,
    launcher: Launcher = "deepspeed",
    options: Sequence[object] = (),
) -> Iterator[Started]:
    """Starts a launch; when the block ends, so do all of its processes.

    `options` are the launcher's own.
    """
    words = command(script, *arguments, processes=processes, launcher=launcher, options=options)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
        launch = Started(process, log)
        try:
            yield launch
        except AssertionError as error:
            raise AssertionError(f"{error}\n{launch.printed()[-6000:]}") from None
        finally:
            for each in (process, *launch.workers()):  # the launcher first: it may start others
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()
