"""The images' HEALTHCHECK: whether this container's training processes are alive.

    python docker/healthcheck.py [PID]

Checks the descendants of the process PID (default: 1, the container's first). A container is
healthy if all of its training processes are running, or if none has started yet, during the
rendezvous of the nodes (when its launcher exits, the entrypoint ends the container). With
HEALTH_SECONDS=S, metrics.jsonl of the newest run below HEALTH_RUNS (default: runs) must also have
grown in the last S seconds, once the training processes are that old; only the first process writes
it, so all nodes must share the folder.

Exit code 0: healthy; 1: unhealthy, with the reason printed; 2: a variable is invalid.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil


def look(first: int, seconds: float | None, runs: Path) -> str | None:
    """Why the container whose first process is `first` is unhealthy; None if it is healthy.

    Args:
        first: a process id.
        seconds: how long a run may make no progress; None for no limit.
        runs: the directory of the runs.
    """
    try:
        found = psutil.Process(first)
        processes = [found, *found.children(recursive=True)]
    except psutil.NoSuchProcess:
        return f"process {first} no longer exists"
    workers, wanted, oldest = set(), 0, 0.0
    for process in processes:
        try:
            if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED):
                continue
            environment = process.environ()
            if "LOCAL_RANK" not in environment:
                continue
            # a training process, or a child of one
            workers.add(environment["LOCAL_RANK"])
            wanted = max(wanted, _local_processes(environment))
            oldest = max(oldest, time.time() - process.create_time())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    if len(workers) < wanted:
        return f"{len(workers)} of {wanted} training processes are running"
    if seconds is None or oldest < seconds:
        return None
    still = _stood_still(runs)
    if still is None:
        return f"no metrics.jsonl below {runs} after {oldest:.0f} s"
    return None if still <= seconds else f"no step for {still:.0f} s (HEALTH_SECONDS={seconds:g})"


def _local_processes(environment: dict[str, str]) -> int:
    # torchrun and accelerate set the first, the deepspeed launcher the second
    return int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or 1)


def _stood_still(runs: Path) -> float | None:
    """Seconds since any run wrote a step; None if there is no run."""
    times = [path.stat().st_mtime for path in runs.rglob("metrics.jsonl")]
    return time.time() - max(times) if times else None


def main(arguments: list[str]) -> int:
    """Returns the exit code and prints the reason, for ``docker inspect``."""
    given = os.environ.get("HEALTH_SECONDS")
    try:
        seconds = float(given) if given else None
    except ValueError:
        print(f"HEALTH_SECONDS={given}: a number of seconds is needed, or an empty value")
        return 2
    first = int(arguments[0]) if arguments else 1
    reason = look(first, seconds, Path(os.environ.get("HEALTH_RUNS", "runs")))
    print(reason or "healthy")
    return int(reason is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
