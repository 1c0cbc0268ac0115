"""The messages of the optimizer between processes: NCCL on one GPU, gloo on a CPU.

NCCL refuses two processes on one GPU; what it says is among the notes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu.peer import CHECKS
from benchmarks.gpu.sections import Sample, Setting
from benchmarks.measuring.launching import TOLD_LINES
from benchmarks.measuring.results import CHECKOUT, Block, Figures

TITLE = "Messages between processes"
PROCESSES = (1, 2)
SECONDS = 18.0
"""Time limit of a job of such processes."""


def measure(setting: Setting) -> Iterator[Sample]:
    """A sample for each number of processes."""
    for count in PROCESSES:
        yield run_peers(setting.device, count, SECONDS * setting.patience)


def run_peers(device: torch.device, count: int, seconds: float) -> Sample:
    """What processes that send each other messages report; they are killed after `seconds`.

    Args:
        device: device of the messages.
        count: number of processes.
        seconds: time limit.
    """
    with tempfile.TemporaryDirectory(prefix="peers-") as name:
        folder, ended = Path(name), time.monotonic() + seconds
        words = [sys.executable, "-m", "benchmarks.gpu.peer", name, str(device), str(count)]
        started: list[subprocess.Popen[bytes]] = []
        try:
            for k in range(count):
                with (folder / f"log-{k}").open("wb") as log:
                    command = [*words, str(k)]
                    started.append(
                        subprocess.Popen(
                            command, cwd=CHECKOUT, stdout=log, stderr=subprocess.STDOUT
                        )
                    )
            for process in started:
                process.wait(max(0.1, ended - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            codes = [process.poll() for process in started]
            for process in started:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        return {
            "processes": count,
            "backend": "nccl" if device.type == "cuda" else "gloo",
            "exit_codes": codes,
            "limit": seconds,
            "reports": [_report(folder / f"process-{k}.json") for k in range(count)],
            "logs": [_last_lines(folder / f"log-{k}") for k in range(count) if codes[k] != 0],
        }


def _report(path: Path) -> Sample:
    nothing: Sample = {"seconds": {}, "error": None}
    return json.loads(path.read_text()) if path.exists() else nothing


def _last_lines(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-TOLD_LINES:])


def figures(samples: list[Sample]) -> Figures:
    """A row for each kind of message, a column for each number of processes."""
    titles = [f"{s['processes']} process{'es' * (s['processes'] > 1)}" for s in samples]
    rows = [[name, *(_cell(sample, name) for sample in samples)] for name in CHECKS]
    notes = ["Milliseconds of the second time, on the slowest process."]
    for sample, title in zip(samples, titles, strict=True):
        reasons = [each["error"] for each in sample["reports"] if each["error"]]
        # a process that could not even join the others has told its log alone
        reasons = reasons or [log.splitlines()[-1] for log in sample["logs"] if log]
        notes += [f"{sample['backend']}, {title}: {why}." for why in dict.fromkeys(reasons)]
        if None in sample["exit_codes"]:
            over = f"not finished after {sample['limit']:g} s, killed"
            notes.append(f"{sample['backend']}, {title}: {over}.")
    return Figures(TITLE, ["", *titles], [Block(samples[0]["backend"], rows)], notes)


def _cell(sample: Sample, name: str) -> str:
    taken = [report["seconds"].get(name) for report in sample["reports"]]
    known = [seconds for seconds in taken if seconds is not None]
    return f"{1e3 * max(known):.2f}" if len(known) == len(taken) else "no"
