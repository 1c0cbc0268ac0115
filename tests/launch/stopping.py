"""Starts a job, and does to it what machines do: signals, a process that no longer answers."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.launch.launching import ROOT, Launcher, command, environment


def metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's ``metrics.jsonl``, which it may be writing at the moment."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing came for {seconds} s"
        time.sleep(0.05)


@contextlib.contextmanager
def started(
    script: str, *arguments: object, processes: int, launcher: Launcher = "deepspeed"
) -> Iterator[subprocess.Popen[bytes]]:
    """A launch that is going on; when the block ends, so do all of its processes."""
    words = command(script, *arguments, processes=processes, launcher=launcher)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield process
        except AssertionError as error:
            log.seek(0)
            raise AssertionError(f"{error}\n{log.read()[-6000:]}") from None
        finally:
            for each in (*workers(process), process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()


def workers(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that a launcher has started, by their index in the job."""
    try:
        children = psutil.Process(launcher.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    found = {}
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RANK" in (variables := child.environ()):
                found[int(variables["RANK"])] = child
    return [found[index] for index in sorted(found)]


def terminate(launcher: subprocess.Popen[bytes], *, seconds: float) -> int:
    """SIGTERM to a launcher and its processes; returns its exit code once all have gone."""
    there = workers(launcher)
    os.killpg(launcher.pid, signal.SIGTERM)
    code = launcher.wait(timeout=seconds)
    _, alive = psutil.wait_procs(there, timeout=seconds)
    assert not alive, f"still there {seconds} s after SIGTERM: {alive}"
    return code
