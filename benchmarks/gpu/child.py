"""One section in a process of its own, which neither an error of the device nor a hang outlives.

The process, ``python -m benchmarks.gpu.child FOLDER``, reads FOLDER/job.json and leaves what it has
found in FOLDER/outcome.json after every sample.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.sections import (
    FAILED,
    FULL,
    RUNNING,
    SMALL,
    STOPPED,
    Outcome,
    Section,
    Setting,
    run_here,
)
from benchmarks.measuring.launching import TOLD_LINES
from benchmarks.measuring.results import CHECKOUT
from launchers.pretraining.environment import prepare_environment
from launchers.reporting.files import write_json

JOB, OUTCOME, LOG = "job.json", "outcome.json", "log"
OWN_SHARE = 0.85
"""Share of its time after which a section stops by itself, before it is stopped."""
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what cuBLAS needs to be deterministic
    "KINETO_LOG_LEVEL": "99",  # the profiler logs every start
}


def run_in_child(
    section: Section, setting: Setting, seconds: float, threads: int | None
) -> Outcome:
    """Run a section in a new process, which is killed after `seconds` with all that it started.

    Args:
        section: one of the sections of :mod:`benchmarks.gpu.plan`.
        setting: where, and how much.
        seconds: time limit, the start of the process included.
        threads: torch threads of the process; None for torch's default.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-") as name:
        folder = Path(name)
        job = {
            "section": section.name,
            "device": str(setting.device),
            "small": setting.sizes == SMALL,
            "threads": threads,
            "until": time.time() + OWN_SHARE * seconds,
        }
        write_json(folder / JOB, job)
        code = _exit_code(folder, seconds)
        outcome = Outcome(**_read(folder / OUTCOME))
        if outcome.status == RUNNING or code != 0:
            outcome.status = STOPPED if code is None else FAILED
            over = f"its {seconds:.0f} s were over, and it was killed"
            outcome.reason = outcome.reason or (over if code is None else f"exit code {code}")
            lines = (folder / LOG).read_text(errors="replace").splitlines()
            outcome.log = outcome.log or "\n".join(lines[-TOLD_LINES:])
    outcome.seconds = time.monotonic() - began
    return outcome


def _exit_code(folder: Path, seconds: float) -> int | None:
    """The exit code of the process, negative for a signal; None if it was killed for its time."""
    words = [sys.executable, "-m", "benchmarks.gpu.child", str(folder)]
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            words,
            cwd=CHECKOUT,
            env={**os.environ, **ENVIRONMENT},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group, to be killed with the processes that it starts
        )
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def main(name: str) -> int:
    """Run the section that the job in a folder names."""
    from benchmarks.gpu.plan import SECTIONS

    folder = Path(name)
    job = _read(folder / JOB)
    prepare_environment(world_of_one=False)
    if job["threads"] is not None:
        torch.set_num_threads(job["threads"])
    setting = Setting(torch.device(job["device"]), SMALL if job["small"] else FULL)

    def keep(outcome: Outcome) -> None:
        write_json(folder / OUTCOME, asdict(outcome))

    run_here(SECTIONS[job["section"]], setting, job["until"], keep)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
