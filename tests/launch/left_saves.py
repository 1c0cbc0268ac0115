"""Jobs of two processes that end while a checkpoint is being written beside them.

    python tests/launch/left_saves.py --folder DIRECTORY

Each is forked from this process and ends as a program does, through the interpreter. Writes what
each process ended with into ``results.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from saving_jobs import PROCESS_SECONDS, optimizer_with_state, warm_up

from arg_dist.checkpoint import Checkpoints, files

ENDS = ("exit", "error", "no groups any more", "full disk")
PROCESSES = 2
SLOW_SECONDS = 0.7
"""How long writing takes, so that the end of the program falls into it."""


def job(end: str, me: int, folder: Path) -> None:
    """Saves step 1 and waits, saves step 2, and ends."""
    signal.alarm(PROCESS_SECONDS)  # one that hangs is ended by it
    logging.basicConfig(filename=folder / f"{end}-{me}.log")
    rendezvous = dist.FileStore(str(folder / f"{end}-store"), PROCESSES)
    dist.init_process_group("gloo", store=rendezvous, rank=me, world_size=PROCESSES)
    checkpoints = Checkpoints(folder / end, optimizer_with_state("world"))
    checkpoints.save(1)
    checkpoints.wait()
    save_file = files.save_file

    def slowly(*arguments: Any) -> None:
        time.sleep(SLOW_SECONDS)
        save_file(*arguments)

    files.save_file = slowly
    if end == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    checkpoints.save(2)
    if end == "error":
        raise RuntimeError("in mid-training")
    if end == "no groups any more":
        dist.destroy_process_group()
    sys.exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder
    warm_up()
    pids: dict[str, list[int]] = {end: [] for end in ENDS}
    for end in ENDS:
        for me in range(PROCESSES):
            pid = os.fork()
            if pid == 0:
                return job(end, me, folder)
            pids[end].append(pid)
    codes = {end: [os.waitpid(pid, 0)[1] for pid in pids[end]] for end in ENDS}
    results = {end: [os.waitstatus_to_exitcode(code) for code in codes[end]] for end in ENDS}
    (folder / "results.json").write_text(json.dumps(results))
    return None


if __name__ == "__main__":
    main()
