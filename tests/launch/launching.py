"""Starts scripts by the real launchers, with a time limit and a free port."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]

Launcher = Literal["deepspeed", "torchrun", "accelerate"]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


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
        "deepspeed": ["--log_level=critical", "--num_gpus", processes, "--master_port", port],
        "torchrun": ["--nproc_per_node", processes, "--master_port", port],
        "accelerate": ["launch", "--num_processes", processes, "--main_process_port", port],
    }
    program = Path(sys.executable).with_name(launcher)
    return [str(word) for word in (program, *own[launcher], *options, script, *arguments)]


def environment() -> dict[str, str]:
    """One thread for each process, and this interpreter's programs first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launch(
    script: str,
    *arguments: object,
    processes: int,
    seconds: float,
    launcher: Launcher = "deepspeed",
    options: Sequence[object] = (),
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs `script` on so many processes; ends all of them, and the test, after `seconds`.

    `variables` are set in the environment beside those of :func:`environment`.
    """
    process = subprocess.Popen(
        command(script, *arguments, processes=processes, launcher=launcher, options=options),
        cwd=ROOT,
        env={**environment(), **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(
            f"{script} was not done after {seconds} s:\n{out[-2000:]}\n{err[-4000:]}"
        ) from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def compare(folder: Path, *runs: str) -> str:
    """What the comparison of the runs in `folder` prints."""
    finished = subprocess.run(
        [sys.executable, "-m", "arg_dist.report", "compare", *runs],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return finished.stdout
