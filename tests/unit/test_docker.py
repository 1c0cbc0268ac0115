"""What lies in docker/, as far as it can be tried without building an image."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from launchers.cluster.cli import main
from tests.patience import patient

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
COMPOSE = DOCKER / "compose.yml"


def services(profile: str) -> dict[str, dict[str, Any]]:
    found = yaml.safe_load(COMPOSE.read_text())["services"]
    return {name: service for name, service in found.items() if profile in service["profiles"]}


def instructions(name: str) -> list[str]:
    """A Dockerfile's instructions after FROM, without comments."""
    text = "\n".join(
        line for line in (DOCKER / name).read_text().splitlines() if not line.startswith("#")
    )
    return [line for line in text.partition("\nFROM ")[2].splitlines()[1:] if line]


def test_the_two_dockerfiles_differ_in_base_torch_and_description_alone() -> None:
    pairs = zip(instructions("Dockerfile"), instructions("Dockerfile.cpu"), strict=True)
    different = [cuda.split("=")[0].strip() for cuda, cpu in pairs if cuda != cpu]
    assert different == ["ARG TORCH_INDEX", "org.opencontainers.image.description"]


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_the_composed_nodes_make_one_cluster(profile: str) -> None:
    nodes = services(profile)
    places = [service["environment"] for service in nodes.values()]
    assert [place["NODE_RANK"] for place in places] == [str(index) for index in range(len(nodes))]
    assert {place["NNODES"] for place in places} == {str(len(nodes))}
    assert {place["MASTER_ADDR"] for place in places} == {next(iter(nodes))}
    for service in nodes.values():
        assert (DOCKER / service["build"]["context"]).resolve() == ROOT
        assert (ROOT / service["build"]["dockerfile"]).is_file()
        assert service["shm_size"]
        assert service["volumes"] == ["runs:/workspace/runs"]
        devices = service.get("deploy", {}).get("resources", {}).get("reservations", {})
        assert bool(devices) == (profile == "gpu")
        config = [word for word in service["command"] if "deepspeed_config" in word]
        assert (ROOT / config[0].partition("=")[2]).is_file()


def test_each_composed_node_would_start(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The cluster's command line takes what a service gives it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's own stay
    for index, service in enumerate(services("cpu").values()):
        for name, value in service["environment"].items():
            # what compose fills in: ${NAME:-default}
            monkeypatch.setenv(name, re.sub(r"\$\{\w+:-(.*)\}", r"\1", value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # its names are known to compose alone
        assert main(["--dry-run", *service["command"]]) == 0
        assert f" {index} of 2" in capfd.readouterr().out


def test_compose_accepts_its_file() -> None:
    version = ["docker", "compose", "version"]
    if shutil.which("docker") is None or subprocess.run(version, check=False).returncode != 0:
        pytest.skip("no docker compose here")
    for profile in ("cpu", "gpu"):
        command = ["docker", "compose", "-f", str(COMPOSE), "--profile", profile, "config", "-q"]
        subprocess.run(command, check=True, timeout=patient(50))


def test_requirements_are_those_of_the_training_extra() -> None:
    script = [sys.executable, str(DOCKER / "requirements.py"), str(ROOT / "pyproject.toml")]
    printed = subprocess.run(
        script, capture_output=True, text=True, check=True, timeout=patient(50)
    ).stdout
    names = {re.split(r"[\[<>=]", line)[0] for line in printed.splitlines()}
    assert {"setuptools", "torch", "pydantic", "deepspeed", "accelerate", "transformers"} <= names
    assert not {"arg-dist", "pytest", "ruff"} & names


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def container(started: list[subprocess.Popen[bytes]], *local_ranks: int) -> int:
    """A process as a container's first one, with training processes below it; its id."""
    sleep = "exec sleep 100"
    lines = [f"LOCAL_RANK={rank} LOCAL_WORLD_SIZE=2 sh -c '{sleep}' &" for rank in local_ranks]
    script = "\n".join([*lines, "sleep 100 &", "wait"])
    started.append(subprocess.Popen(["bash", "-c", script], start_new_session=True))
    there = psutil.Process(started[-1].pid)
    deadline = time.monotonic() + 30
    while [child.name() for child in there.children()] != ["sleep"] * (len(lines) + 1):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return started[-1].pid


def health(first: int, **variables: object) -> tuple[int, str]:
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    command = [sys.executable, str(DOCKER / "healthcheck.py"), str(first)]
    ran = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=patient(50), check=False
    )
    return ran.returncode, ran.stdout.strip()


def test_a_container_is_healthy_while_its_processes_live_and_steps_come(
    started: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    assert health(container(started)) == (0, "healthy")
    assert health(container(started, 0)) == (1, "1 of 2 training processes are running")
    both = container(started, 0, 1)
    assert health(both) == (0, "healthy")

    runs = {"HEALTH_SECONDS": 0.1, "HEALTH_RUNS": tmp_path}
    assert "no metrics.jsonl" in health(both, **runs)[1]
    metrics = tmp_path / "job/metrics.jsonl"
    metrics.parent.mkdir()
    metrics.touch()
    time.sleep(0.2)
    assert "no step for" in health(both, **runs)[1]
    assert health(both, **{**runs, "HEALTH_SECONDS": 1000}) == (0, "healthy")
    assert health(both, HEALTH_SECONDS="soon")[0] == 2
    assert health(2**22 - 1) == (1, f"process {2**22 - 1} no longer exists")


STAND_IN = """#!/usr/bin/env bash
# ssh -o BatchMode=yes HOST COMMAND: runs it here
shift 2
echo "$1" >>"$LOG"
exec bash -c "$2"
"""
DOCKER_STAND_IN = """#!/usr/bin/env bash
echo "docker $*"
[[ $1 == stop ]] && touch "$LOG.stopped" && exit 0
[[ $* == *fail* && $* == *NODE_RANK=1* ]] && exit 7
while [[ $* == *sleeps* && ! -e $LOG.stopped ]]; do sleep 0.1; done
exit 0
"""


@pytest.fixture
def over_ssh(tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """The script with a hostfile of two, and an environment where ssh and docker are stand-ins."""
    for name, text in (("ssh", STAND_IN), ("docker", DOCKER_STAND_IN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("# two\nme@alpha slots=4\n\nbeta slots=2 # old\n")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"LOG": str(tmp_path / "log"), "DOCKER_OPTIONS": "--gpus all"}
    environment.pop("MASTER_ADDR", None)
    return ["bash", str(DOCKER / "over_ssh.sh"), str(tmp_path / "hosts"), "image"], environment


def test_a_hostfile_starts_a_container_on_each_host(
    over_ssh: tuple[list[str], dict[str, str]], tmp_path: Path
) -> None:
    command, environment = over_ssh
    job = ["job.py", "--data", "two words"]
    ran = subprocess.run(
        [*command, *job],
        env=environment,
        capture_output=True,
        text=True,
        timeout=patient(50),
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert sorted((tmp_path / "log").read_text().split()) == ["beta", "me@alpha"]
    for node, (host, slots) in enumerate([("me@alpha", 4), ("beta", 2)]):
        line = next(
            line for line in ran.stdout.splitlines() if line.startswith(f"{host}: docker run")
        )
        assert f"-e NNODES=2 -e NODE_RANK={node} -e MASTER_ADDR=alpha -e MASTER_PORT=29400" in line
        assert line.endswith(f"-e NPROC_PER_NODE={slots} --gpus all image job.py --data two words")
        assert f"over_ssh: {host}: " in ran.stdout


def test_a_host_that_fails_and_a_signal_are_told_by_the_exit_code(
    over_ssh: tuple[list[str], dict[str, str]], tmp_path: Path
) -> None:
    command, environment = over_ssh
    failed = subprocess.run([*command, "fail"], env=environment, timeout=patient(50), check=False)
    assert failed.returncode == 7
    empty = ["bash", command[1], os.devnull, "image"]
    assert subprocess.run(empty, env=environment, timeout=patient(50), check=False).returncode == 2

    process = subprocess.Popen([*command, "sleeps"], env=environment)
    deadline = time.monotonic() + 30
    # both of this run beside both of the one before
    while len((tmp_path / "log").read_text().split()) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=patient(40))
    assert (tmp_path / "log.stopped").exists()
