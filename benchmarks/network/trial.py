"""One job on hosts of which the links have a bandwidth, and what its steps cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from arg_dist.cli.parsing import InputError
from benchmarks.network import clocked
from tests.hosts.namespaces import Host, network

POLL_SECONDS = 0.1
GRACE_SECONDS = 60.0
"""For the other hosts to end by themselves once one has failed."""
TOLD_LINES = 20


@dataclass(frozen=True)
class Trial:
    """What is run.

    Attributes:
        hosts: number of hosts.
        processes: number of training processes on each.
        script: the training job, which takes the options of ``launchers/train_lm.py``.
        words: its options, but for the optimizer's, the number of steps and --out.
        warmup: steps that are not measured, in which memory is allocated and bases are found.
        steps: steps that are measured.
        limit: seconds that it may take altogether.
    """

    hosts: int
    processes: int
    script: Path
    words: tuple[str, ...]
    warmup: int
    steps: int
    limit: float


def run_trial(
    trial: Trial, optimizer: str, bits_per_second: float | None, folder: Path
) -> dict[str, Any]:
    """Trains on new hosts.

    Args:
        trial: what is run.
        optimizer: value of the job's option ``--optimizer``.
        bits_per_second: of every host's cable, in each direction; None for no limit.
        folder: a directory that is not there yet, for logs, notes and the run's report.

    Returns:
        The numbers of :func:`measured`; and the job's own ``sent_bytes_per_step``: the mean over
        processes of what the optimizer sent, None if it does not count.

    Raises:
        InputError: a host has failed, or the time limit is over; its last lines are in the message.
    """
    folder.mkdir(parents=True)
    notes, out = folder / "notes", folder / "run"
    notes.mkdir()
    total = trial.warmup + trial.steps
    job = [str(trial.script), *trial.words, "--optimizer", optimizer, "--steps", str(total)]
    rare = ["--eval-every", str(total), "--eval-batches", "1", "--log-ranks-every", str(total)]
    job += [*rare, "--out", str(out)]
    with network(trial.hosts) as members:
        for host in members:
            host.limit(bits_per_second)
        started = [
            _start(trial, members, number, [clocked.__file__, str(notes), *job], folder)
            for number in range(trial.hosts)
        ]
        _wait(started, folder, trial.limit)
    everyone = [json.loads(path.read_text()) for path in sorted(notes.iterdir())]
    sent = json.loads((out / "report.json").read_text())["sent_bytes_per_step"]
    return {
        **measured(everyone, warmup=trial.warmup),
        "optimizer_bytes": fmean(sent) if sent else None,
    }


def measured(processes: Sequence[Sequence[dict[str, float]]], *, warmup: int) -> dict[str, float]:
    """What a step cost, out of the notes that each process took.

    Args:
        processes: notes of :mod:`benchmarks.network.clocked`, for each process; those of one host
            read the same counters, and every host has as many.
        warmup: steps that do not count; at least 1, since a step is measured from the end of the
            one before.

    Returns:
        ``seconds``: the median time of a step; ``waiting``: the share of the time that processes
        waited for collectives, the mean over processes; ``sent`` and ``received``: bytes that went
        through a host's cable in a step, the mean over steps and hosts.
    """
    durations, shares, sent, received = [], [], [], []
    for notes in processes:
        counted = notes[warmup - 1 :]
        first, last = counted[0], counted[-1]
        elapsed = last["clock"] - first["clock"]
        steps = len(counted) - 1
        durations += [b["clock"] - a["clock"] for a, b in pairwise(counted)]
        shares.append((last["waited"] - first["waited"]) / elapsed)
        sent.append((last["sent"] - first["sent"]) / steps)
        received.append((last["received"] - first["received"]) / steps)
    return {
        "seconds": median(durations),
        "waiting": fmean(shares),
        "sent": fmean(sent),
        "received": fmean(received),
    }


def _start(
    trial: Trial, members: Sequence[Host], number: int, job: Sequence[str], folder: Path
) -> subprocess.Popen[bytes]:
    place = {
        "NNODES": str(trial.hosts),
        "NODE_RANK": str(number),
        "MASTER_ADDR": members[0].address,
        "NPROC_PER_NODE": str(trial.processes),
    }
    # Each process would take every core of what are several hosts to it alone.
    cores = len(os.sched_getaffinity(0)) // (trial.hosts * trial.processes)
    environment = {"OMP_NUM_THREADS": str(max(1, cores)), **os.environ, **place}
    words = [sys.executable, "-m", "launchers.cluster", *job]
    with _log(folder, number).open("wb") as output:
        return members[number].start(
            words, output=output, environment=environment, folder=Path.cwd()
        )


def _wait(started: Sequence[subprocess.Popen[bytes]], folder: Path, limit: float) -> None:
    deadline = time.monotonic() + limit
    failed: int | None = None
    while any(process.poll() is None for process in started):
        codes = [process.poll() for process in started]
        if failed is None and any(codes):
            failed = next(number for number, code in enumerate(codes) if code)
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    codes = [process.poll() for process in started]
    if not any(code != 0 for code in codes):
        return
    number = failed if failed is not None else next(n for n, code in enumerate(codes) if code != 0)
    what = f"ended with {codes[number]}" if codes[number] else f"was not done after {limit:g} s"
    log = _log(folder, number)
    tail = log.read_text(errors="replace").splitlines()[-TOLD_LINES:]
    raise InputError("\n".join([f"host {number} {what} (all it printed: {log}):", *tail]))


def _log(folder: Path, number: int) -> Path:
    return folder / f"host-{number}.log"
