"""Two nodes at 127.0.0.1, from the shipped scripts to processes that know their place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.launching import ROOT, environment
from tests.patience import patient
from tests.ports import free_port

pytestmark = [pytest.mark.launch, pytest.mark.timeout(280)]

SECONDS = 240
JOB = """  # deepspeed puts an option before the arguments
import json, os, sys
keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GLOO_SOCKET_IFNAME")
place = {key: os.environ.get(key) for key in keys}
open(sys.argv[-2] + "/" + place["RANK"], "w").write(json.dumps(place))
sys.exit(int(sys.argv[-1]))
"""
SRUN = """#!/usr/bin/env bash
# A task on each node of the allocation, as srun starts them.
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NUM_NODES=2 SLURM_LOCALID=0
SLURM_NODEID=1 "$@" & other=$!
SLURM_NODEID=0 "$@" && status=0 || status=$?
wait "$other" && exit "$status"
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A script that leaves what it was told in a folder, and ends with a code."""
    path = tmp_path / "job.py"
    path.write_text(JOB)
    (tmp_path / "told").mkdir()
    return path


def told(job: Path) -> list[dict[str, str]]:
    files = sorted((job.parent / "told").iterdir())
    return [json.loads(file.read_text()) for file in files]


def as_four_processes_on_two_nodes() -> list[dict[str, str]]:
    return [
        {
            "RANK": str(process),
            "WORLD_SIZE": "4",
            "LOCAL_RANK": str(process % 2),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        for process in range(4)
    ]


def variables(**more: str) -> dict[str, str]:
    kept = {
        key: value
        for key, value in environment().items()
        if not key.startswith(("SLURM", "NNODES", "NODE_RANK", "MASTER_", "GLOO_", "NCCL_"))
    }
    python = {"PYTHONPATH": str(ROOT), "NPROC_PER_NODE": "2", "START_TIMEOUT": "120"}
    return kept | python | {"MASTER_PORT": str(free_port())} | more


def test_slurm_starts_one_task_a_node(job: Path) -> None:
    """With a stand-in for srun: the script, Slurm's variables, torchrun on both nodes."""
    programs = job.parent / "bin"
    programs.mkdir()
    (programs / "srun").write_text(SRUN)
    (programs / "srun").chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    allocation = variables(
        PATH=path,
        SLURM_JOB_ID="7",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="localhost,elsewhere",
        SLURM_SUBMIT_DIR=str(job.parent),
    )
    finished = subprocess.run(
        ["bash", ROOT / "launchers/multinode/slurm.sbatch", job, job.parent / "told", "0"],
        env=allocation,
        capture_output=True,
        text=True,
        timeout=patient(SECONDS),
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert told(job) == as_four_processes_on_two_nodes()
    assert "slurm.sbatch: srun --ntasks-per-node=1" in finished.stdout
    for node in (0, 1):
        assert f"node {node}: number {node} of 2 nodes, node 0 is at localhost:" in finished.stdout


def test_deepspeed_without_ssh_and_a_job_that_fails(job: Path) -> None:
    both = variables(NNODES="2", MASTER_ADDR="127.0.0.1")
    words = [
        "bash",
        ROOT / "launchers/multinode/node.sh",
        "deepspeed",
        job,
        job.parent / "told",
        "5",
    ]
    nodes = [
        subprocess.Popen(
            words,
            env=both | {"NODE_RANK": str(node)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (0, 1)
    ]
    try:
        printed = [node.communicate(timeout=patient(SECONDS))[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [5, 5], printed
    assert told(job) == as_four_processes_on_two_nodes()
    assert "the launcher exited with code 5" in printed[0]
    assert "--no_ssh --node_rank 1" in printed[1]


def test_a_signal_ends_a_node_that_still_waits(job: Path) -> None:
    words = [sys.executable, "-m", "launchers.cluster", "--nodes", "2", "--node-rank", "1"]
    node = subprocess.Popen(
        [*words, "--master-addr", "127.0.0.1", job, job.parent / "told", "0"],
        env=variables(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert node.stdout is not None
        printed = [node.stdout.readline() for _ in range(5)]
        assert "torch.distributed.run --nnodes 2" in printed[-1]  # what it is about to run
        node.terminate()
        assert node.wait(SECONDS) == 143
        assert node.stdout.read() == ""
    finally:
        node.kill()
    assert told(job) == []
