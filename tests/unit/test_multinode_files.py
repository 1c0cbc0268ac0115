"""The scripts and YAML files for several machines say what launchers.cluster and others read."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run as torchrun
import yaml

from launchers.cluster.cli import _parser, _read_job
from launchers.cluster.place import Place, find_place
from launchers.pretraining.options import parse_options
from tests.patience import patient

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launchers/multinode"
FILES = ["deepspeed_ssh.sh", "kubernetes.yaml", "node.sh", "slurm.sbatch"]


def test_every_file_is_tested_here() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == FILES


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    read = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    return {manifest["kind"]: manifest for manifest in read}


@pytest.fixture(scope="module")
def container(manifests: dict[str, Any]) -> dict[str, Any]:
    (only,) = manifests["Job"]["spec"]["template"]["spec"]["containers"]
    return dict(only)


def test_each_pod_finds_its_place(manifests: dict[str, Any], container: dict[str, Any]) -> None:
    job = manifests["Job"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    for index in range(job["completions"]):
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        environment["JOB_COMPLETION_INDEX"] = str(index)
        place = find_place(environment)
        assert place == Place(index, job["completions"], "arg-dist-0.arg-dist", 29400)


def test_the_first_pod_has_the_name_that_the_others_look_for(
    manifests: dict[str, Any], container: dict[str, Any]
) -> None:
    job, service = manifests["Job"], manifests["Service"]
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    address = find_place({entry["name"]: entry["value"] for entry in container["env"]} | {
        "JOB_COMPLETION_INDEX": "0"
    }).address  # fmt: skip
    assert address == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["restartPolicy"] == "OnFailure"
    assert container["ports"][0]["containerPort"] == 29400
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_the_command_line_of_the_pods_is_understood(
    container: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    job = _read_job(_parser().parse_args(container["args"]), environment)
    assert (job.launcher, job.max_restarts, job.start_timeout) == ("torchrun", 10, 1800)
    helped = _parser().format_help()
    assert all(name in helped for name in environment)
    monkeypatch.setattr(sys, "argv", list(job.script))
    options = parse_options("")
    assert (options.resume, options.save_every, options.time_limit) == ("auto", 500, 300)
    assert Path(options.deepspeed_config).is_file()


def test_accelerate_alone_reads_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands import launch

    ran: list[argparse.Namespace] = []
    monkeypatch.setattr(torchrun, "run", ran.append)
    words = ["--config_file", str(ROOT / "launchers/accelerate/multinode_fsdp2.yaml")]
    words += ["--machine_rank", "1", "--main_process_ip", "10.0.0.1", "train.py"]
    args = launch.launch_command_parser().parse_args(words)
    launch.launch_command(args)
    assert (ran[0].nnodes, ran[0].nproc_per_node, ran[0].node_rank) == ("2", "8", 1)
    assert ran[0].rdzv_endpoint == "10.0.0.1:29500"
    assert (args.use_fsdp, args.fsdp_version) == (True, 2)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose programs are found first; copies of the scripts lie beside it."""
    shutil.copytree(FOLDER, tmp_path / "launchers/multinode")
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for name in ("MASTER_ADDR", "MASTER_PORT", "DEEPSPEED_LAUNCHER"):
        monkeypatch.delenv(name, raising=False)
    return folder


def stand_in(folder: Path, name: str, body: str) -> None:
    """A program called `name`."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def run(programs: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A copy of a shipped script, with the stand-ins."""
    return subprocess.run(
        ["bash", str(programs.parent / "launchers/multinode" / script), *arguments],
        capture_output=True,
        text=True,
        timeout=patient(50),
        check=False,
        cwd=programs.parent,
    )


def test_ssh_is_left_to_deepspeed(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.launcher import runner

    stand_in(programs, "deepspeed", 'printf "%s\\n" "$@" >given')
    hostfile = programs.parent / "hosts"
    hostfile.write_text("# two machines\nworker-1 slots=8\n\nworker-2 slots=8\n")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    finished = run(programs, "deepspeed_ssh.sh", "hosts", "train.py", "--name", "with space")
    assert finished.returncode == 0, finished.stderr
    given = (programs.parent / "given").read_text().splitlines()
    args = runner.parse_args(given)
    assert dict(runner.fetch_hostfile(args.hostfile)) == {"worker-1": 8, "worker-2": 8}
    assert (args.launcher, args.master_addr, args.master_port) == ("pdsh", "10.0.0.1", 29500)
    assert [args.user_script, *args.user_args] == ["train.py", "--name", "with space"]
    told = finished.stdout.splitlines()
    assert told[:2] == [
        "deepspeed_ssh.sh: host worker-1 slots=8",
        "deepspeed_ssh.sh: host worker-2 slots=8",
    ]
    assert shlex.split(told[2])[1:] == ["deepspeed", *given]


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        ("deepspeed_ssh.sh", ["hosts"], "a hostfile and a script"),
        ("deepspeed_ssh.sh", ["absent", "train.py"], "hostfile absent"),
        ("node.sh", ["mpirun", "train.py"], "got 'mpirun'"),
        ("node.sh", [], "got ''"),
        ("slurm.sbatch", [], "a script and its arguments"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    programs: Path, script: str, arguments: list[str], named: str
) -> None:
    finished = run(programs, script, *arguments)
    assert finished.returncode == 2
    assert named in finished.stderr


def test_a_node_starts_by_one_command(programs: Path) -> None:
    stand_in(programs, "python", 'printf "%s\\n" "$@" >given')
    finished = run(programs, "node.sh", "deepspeed", "train.py", "--steps", "3")
    assert finished.returncode == 0, finished.stderr
    given = (programs.parent / "given").read_text().split()
    assert given[:2] == ["-m", "launchers.cluster"]
    options = _parser().parse_args(given[2:])
    assert (options.launcher, options.script) == ("deepspeed", "train.py")
    assert options.arguments == ["--steps", "3"]
