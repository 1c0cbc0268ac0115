"""Run one job on hosts with links of a given bandwidth, and measure its steps."""

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
from benchmarks.network.methods import Method
from tests.hosts.namespaces import Host, network

POLL_SECONDS = 0.1
GRACE_SECONDS = 60.0
"""Time for the other hosts to exit by themselves once one has failed."""
TOLD_LINES = 20
"""Lines of the log to include in an error."""


@dataclass(frozen=True)
class Trial:
    """The job to run.

    Attributes:
        hosts: number of hosts.
        processes: number of training processes per host.
        script: the training script, which takes the options of ``launchers/train_lm.py``.
        words: arguments of the script, without the method's, the number of steps and --out.
        engine: arguments of the script that choose DeepSpeed.
        warmup: unmeasured steps, in which memory is allocated and all bases are refreshed.
        steps: measured steps.
        limit: time limit of the whole job in seconds.
    """

    hosts: int
    processes: int
    script: Path
    words: tuple[str, ...]
    engine: tuple[str, ...]
    warmup: int
    steps: int
    limit: float


def run_trial(
    trial: Trial, method: Method, bits_per_second: float | None, folder: Path
) -> dict[str, Any]:
    """Train on new hosts.

    Args:
        trial: the job to run.
        method: how gradients are averaged, and the optimizer.
        bits_per_second: bandwidth of every host's link in each direction; None for no limit.
        folder: new directory for logs, records and the run's report.

    Returns:
        The numbers of :func:`measured`, and ``optimizer_bytes``: the job's ``sent_bytes_per_step``,
        averaged over processes; None if the optimizer does not count them.

    Raises:
        InputError: a host failed, or the time limit expired; the message includes the last lines of
            its log.
    """
    folder.mkdir(parents=True)
    notes, out = folder / "notes", folder / "run"
    notes.mkdir()
    total = trial.warmup + trial.steps
    engine = () if method.under_ddp else trial.engine
    job = [str(trial.script), *engine, *trial.words, *method.words, "--steps", str(total)]
    rare = ["--eval-every", str(total), "--eval-batches", "1", "--log-ranks-every", str(total)]
    job += [*rare, "--out", str(out)]
    with network(trial.hosts) as members:
        for host in members:
            host.limit(bits_per_second)
        started = [
            _start(
                trial, members, number, [clocked.__file__, str(notes), method.hook, *job], folder
            )
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
    """The cost of a step, from the records of each process.

    Args:
        processes: records of :mod:`benchmarks.network.clocked` by process; processes of one host
            read the same counters, and all hosts have the same number of processes.
        warmup: steps to skip; at least 1, as a step is measured from the end of the previous one.

    Returns:
        ``seconds``: median time of a step; ``waiting``: share of the time spent waiting for
        collectives, averaged over processes; ``sent`` and ``received``: bytes through a host's link
        per step, averaged over steps and hosts.
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
    # Hosts share the cores: without this, every process would use all of them.
    cores = len(os.sched_getaffinity(0)) // (trial.hosts * trial.processes)
    environment = {"OMP_NUM_THREADS": str(max(1, cores)), **os.environ, **place}
    command = [sys.executable, "-m", "launchers.cluster", *job]
    with _log(folder, number).open("wb") as output:
        return members[number].start(
            command, output=output, environment=environment, folder=Path.cwd()
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
    what = f"exited with {codes[number]}" if codes[number] else f"not finished after {limit:g} s"
    log = _log(folder, number)
    tail = log.read_text(errors="replace").splitlines()[-TOLD_LINES:]
    raise InputError("\n".join([f"host {number}: {what} (full log: {log}):", *tail]))


def _log(folder: Path, number: int) -> Path:
    return folder / f"host-{number}.log"
