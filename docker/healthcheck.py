"""Whether the training processes of this container live; the images' HEALTHCHECK.

    python docker/healthcheck.py [PID]

Looks at the descendants of the process PID (default: 1, the container's first). A container is
healthy that has as many training processes as it wants, or none yet: while it meets the other nodes
(that it ends when its launcher has is the entrypoint's work). With HEALTH_SECONDS=S, metrics.jsonl
of the newest run below HEALTH_RUNS (default: runs) must also have grown in the last S seconds, once
the training processes are that old; the first process alone writes it, so the folder has to be one
that all nodes share.

Exit code 0: healthy; 1: not, and why is printed; 2: a variable that cannot be used.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil


def look(first: int, seconds: float | None, runs: Path) -> str | None:
    """What is wrong with the container whose first process is `first`; None if nothing is.

    Args:
        first: a process id.
        seconds: how long a run may stand still; None: for ever.
        runs: where the runs' directories are.
    """
    try:
        found = psutil.Process(first)
        processes = [found, *found.children(recursive=True)]
    except psutil.NoSuchProcess:
        return f"process {first} is gone"
    workers, wanted, oldest = set(), 0, 0.0
    for process in processes:
        try:
            if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED):
                continue
            environment = process.environ()
            if "LOCAL_RANK" not in environment:
                continue
            # a training process, or one that it has started
            workers.add(environment["LOCAL_RANK"])
            wanted = max(wanted, _local_processes(environment))
            oldest = max(oldest, time.time() - process.create_time())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    if len(workers) < wanted:
        return f"{len(workers)} of {wanted} training processes live"
    if seconds is None or oldest < seconds:
        return None
    still = _stood_still(runs)
    if still is None:
        return f"no metrics.jsonl below {runs} after {oldest:.0f} s"
    return None if still <= seconds else f"no step for {still:.0f} s (HEALTH_SECONDS={seconds:g})"


def _local_processes(environment: dict[str, str]) -> int:
    # torchrun and accelerate say the first, the deepspeed launcher the second
    return int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or 1)


def _stood_still(runs: Path) -> float | None:
    """Seconds since any run has written a step; None if there is none."""
    times = [path.stat().st_mtime for path in runs.rglob("metrics.jsonl")]
    return time.time() - max(times) if times else None


def main(arguments: list[str]) -> int:
    """The exit code; what is wrong is printed, for ``docker inspect``."""
    given = os.environ.get("HEALTH_SECONDS")
    try:
        seconds = float(given) if given else None
    except ValueError:
        print(f"HEALTH_SECONDS={given}: a number of seconds is needed, or nothing")
        return 2
    first = int(arguments[0]) if arguments else 1
    wrong = look(first, seconds, Path(os.environ.get("HEALTH_RUNS", "runs")))
    print(wrong or "healthy")
    return int(wrong is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
