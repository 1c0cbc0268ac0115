"""Starts scripts by the real launchers, or forked, with a time limit and a free port."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tests.installed import deepspeed_quiet
from tests.launch.forking import run_forked
from tests.patience import patient
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
SETTLED = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # or the Muon that DeepSpeed imports loads a compiler: a second
}
"""Variables of all launches."""

Launcher = Literal["deepspeed", "torchrun", "accelerate"]
Start = Launcher | Literal["forked"]
"""A launcher, or processes of :mod:`tests.launch.forking` with the environment of torchrun's."""


def command(
    script: str,
    *arguments: object,
    processes: int,
    launcher: Launcher = "deepspeed",
    options: Sequence[object] = (),
) -> list[str]:
    """The command line of a launch; `options` are the launcher's own."""
    port = free_port()
    own: dict[Launcher, list[object]] = {
        "deepspeed": [*deepspeed_quiet(), "--num_gpus", processes, "--master_port", port],
        "torchrun": ["--nproc_per_node", processes, "--master_port", port],
        "accelerate": ["launch", "--num_processes", processes, "--main_process_port", port],
    }
    program = Path(sys.executable).with_name(launcher)
    return [str(word) for word in (program, *own[launcher], *options, script, *arguments)]


def environment() -> dict[str, str]:
    """One thread for each process, and this interpreter's programs first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, **SETTLED}


def position(process_index: int, processes: int, port: int) -> dict[str, str]:
    """What a launcher tells each of its processes."""
    return {
        "RANK": str(process_index),
        "LOCAL_RANK": str(process_index),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "LOCAL_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def launch(
    script: str,
    *arguments: object,
    processes: int,
    seconds: float,
    launcher: Start = "deepspeed",
    options: Sequence[object] = (),
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs `script` on so many processes; ends all of them, and the test, after `seconds`.

    `variables` are set in the environment beside those of :func:`environment`.
    """
    everywhere = {**environment(), **(variables or {})}
    if launcher != "forked":
        words = command(script, *arguments, processes=processes, launcher=launcher, options=options)
        return run_forked(words, [everywhere], folder=ROOT, seconds=seconds)
    words, port = [script, *map(str, arguments)], free_port()
    each = [{**everywhere, **position(index, processes, port)} for index in range(processes)]
    return run_forked(words, each, folder=ROOT, seconds=seconds)


def seen_by_each(script: str, out: Path, *, processes: int, seconds: float) -> list[dict[str, Any]]:
    """What each process of a script saw, which it writes to ``OUT/INDEX.json``."""
    finished = launch(script, "--out", out, processes=processes, seconds=seconds, launcher="forked")
    assert finished.returncode == 0, finished.stderr[-6000:]
    return [json.loads((out / f"{index}.json").read_text()) for index in range(processes)]


def alone(
    script: str,
    *arguments: object,
    seconds: float,
    forked: bool = True,
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs `script` without a launcher; ends it, and the test, after `seconds`.

    A process that is not `forked` is started by ``python``, and imports for itself.
    """
    words, everywhere = [script, *map(str, arguments)], {**environment(), **(variables or {})}
    if forked:
        return run_forked(words, [everywhere], folder=ROOT, seconds=seconds)
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=everywhere,
        capture_output=True,
        text=True,
        timeout=patient(seconds),
        check=False,
    )


def compare(folder: Path, *runs: str) -> str:
    """What the comparison of the runs in `folder` prints."""
    finished = subprocess.run(
        [sys.executable, "-m", "launchers.reporting", "compare", *runs],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return finished.stdout
