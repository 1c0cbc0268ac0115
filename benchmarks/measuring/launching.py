"""Launch the processes of a measured job, as a user would, and collect their figures."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from arg_dist.cli.parsing import InputError
from launchers.reporting.files import write_json
from tests.hosts.namespaces import INTERFACE, Host

GRACE_SECONDS = 20.0
"""Time for torchrun to terminate its processes."""
TOLD_LINES = 15
"""Lines of the log to include in an error."""
PORT = 29500
"""Rendezvous port of processes on separate hosts."""


class JobError(InputError):
    """A job failed; `reason` is the error of the first failed process, if it reported one."""

    def __init__(self, message: str, reason: str | None) -> None:
        super().__init__(message)
        self.reason = reason


def run_job(
    kind: str,
    job: Mapping[str, Any],
    *,
    processes: int,
    threads: int | None,
    limit: float,
    hosts: Sequence[Host] = (),
) -> list[dict[str, Any]]:
    """Run a function of :mod:`benchmarks.measuring.job` in fresh processes.

    Several processes on this machine are launched by torchrun.

    Args:
        kind: name of the function.
        job: its arguments.
        processes: number of processes.
        threads: torch threads per process; None for the default, a share of the cores.
        limit: seconds after which all processes are terminated.
        hosts: hosts to run on, one process each; empty for this machine.

    Returns:
        The figures of each process, by index.

    Raises:
        JobError: a process failed, or the time limit expired; the message includes the last lines
            of the log.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        write_json(folder / "job.json", {"kind": kind, "limit": limit, "threads": threads, **job})
        log = folder / "log"
        environment = _environment(str(job["device"]))
        if hosts:
            code = _run_on(hosts, _job(folder), log, environment, limit)
        else:
            code = _run(_words(folder, processes), log, environment, limit)
        found = [_figures(folder, index) for index in range(processes)]
        if code == 0 and all(found):
            return found
        lines = log.read_text(errors="replace").splitlines()[-TOLD_LINES:]
    reason = next((figures["error"] for figures in found if "error" in figures), None)
    what = f"not finished after {limit:g} s" if code is None else f"exited with {code}"
    about = " ".join(f"{key}={value}" for key, value in job.items())
    raise JobError("\n".join([f"{kind} {about}, {processes} processes: {what}:", *lines]), reason)


def _job(folder: Path) -> list[str]:
    return ["-m", "benchmarks.measuring.job", str(folder / "job.json"), str(folder)]


def _words(folder: Path, processes: int) -> list[str]:
    job = _job(folder)
    if processes == 1:
        return [sys.executable, *job]
    meeting = ["--master_addr", "127.0.0.1", "--master_port", str(_free_port())]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    return [*torchrun, "--nproc_per_node", str(processes), *meeting, *job]


def _environment(device: str) -> dict[str, str]:
    environment = {**os.environ, "KINETO_LOG_LEVEL": "99"}  # the profiler logs every start
    if torch.device(device).type == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return environment


def _run(command: list[str], log: Path, environment: Mapping[str, str], limit: float) -> int | None:
    """Run `command` and return its exit code; None if the time limit expired."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also on Ctrl-C: torchrun terminates its processes on SIGTERM
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _run_on(
    hosts: Sequence[Host],
    job: list[str],
    log: Path,
    environment: Mapping[str, str],
    limit: float,
) -> int | None:
    """Run a process on each host; the first nonzero exit code, None if the time limit expired."""
    shared = {"WORLD_SIZE": str(len(hosts)), "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": INTERFACE}
    meeting = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(PORT)}
    with log.open("wb") as output:
        started = [
            host.start(
                [sys.executable, *job],
                output=output,
                environment={**environment, **shared, **meeting, "RANK": str(number)},
                folder=Path.cwd(),
            )
            for number, host in enumerate(hosts)
        ]
    deadline = time.monotonic() + limit
    try:
        codes = [process.wait(max(0.0, deadline - time.monotonic())) for process in started]
    except subprocess.TimeoutExpired:
        return None
    return next((code for code in codes if code), 0)


def _figures(folder: Path, index: int) -> dict[str, Any]:
    path = folder / f"process-{index}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
