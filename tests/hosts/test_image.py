"""The CPU image: built from a clean checkout without network, and run on two hosts.

Building takes minutes; the variable ARG_DIST_IMAGE_CACHE names a folder in which what is downloaded
for it stays.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.hosts import Node, hosts
from tests.hosts.images import (
    BASE,
    CACHE,
    IMAGE,
    Images,
    checkout,
    fetch_wheels,
    make_base,
    obstacle,
    run,
)
from tests.launch.launching import ROOT
from tests.launch.tiny_jobs import write_text
from tests.patience import patient
from tests.tolerances import LOSSES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]

LARGEST = 2.5e9
"""Bytes; torch has 0.75e9 of them."""
USER = 10001
STEPS = 5
JOB = ["launchers/train_lm.py", "--model=nano", "--data=/data", f"--steps={STEPS}", "--warmup=1"]
JOB += ["--lr=1.2e-2", "--batch-size=8", "--seq-len=32", "--eval-batches=1", "--time-limit=300"]
ON_CPUS = "/shim/cpu_fsdp.py"
"""Lets accelerate shard with FSDP on CPUs, and runs the job; it is no part of the image."""
FSDP2 = ["--launcher=accelerate", "--accelerate-config=launchers/accelerate/multinode_fsdp2.yaml"]
WAYS = {
    "ZeRO-2": [*JOB, "--deepspeed_config=ds_configs/zero2.json"],
    "ZeRO-3": ["--launcher=deepspeed", *JOB, "--deepspeed_config=ds_configs/zero3.json"],
    "FSDP2": [*FSDP2, ON_CPUS, *JOB],
}
"""For each engine, what follows the entrypoint; three launchers."""
SETTLED = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "START_TIMEOUT": "600"}


def in_a_host(words: list[str], log: Path, *, seconds: float = 300) -> str:
    """What a command prints in a host of its own, with which all of its processes end."""
    with hosts(1) as (host,):
        node = Node(host, words, log)
        code = node.ends(seconds=seconds)
    assert code == 0, node.printed()[-6000:]
    return node.printed()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    if (why := obstacle()) is not None:
        pytest.skip(f"no images here: {why}")
    images = Images(tmp_path_factory.mktemp("images"))
    try:
        yield images
    finally:
        images.remove()


@pytest.fixture(scope="module")
def image(images: Images, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of the built image."""
    given = os.environ.get(CACHE)
    cache = Path(given) if given else tmp_path_factory.mktemp("cache")
    cache.mkdir(parents=True, exist_ok=True)
    make_base(images, cache)
    sources = checkout(tmp_path_factory.mktemp("clean") / "arg_dist")
    fetch_wheels(sources, cache)
    options = ["--isolation", "chroot", "--format", "docker"]
    options += ["--build-arg", f"BASE_IMAGE={BASE}", "--build-arg", "REVISION=abc"]
    file = sources / "docker/Dockerfile.cpu"
    command = images.command("build", *options, "--file", file, "--tag", IMAGE, sources)
    in_a_host(command, images.folder / "build.log", seconds=3600)  # where no mirror is reached
    shutil.rmtree(sources)
    return IMAGE


@pytest.fixture(scope="module")
def container(images: Images, image: str) -> Iterator[str]:
    with images.container(image) as name:
        yield name


def test_the_context_is_the_sources_alone(images: Images, tmp_path: Path) -> None:
    sources = checkout(tmp_path / "arg_dist")
    run(["git", "-C", sources, "init", "--quiet"], seconds=30)
    unwanted = [".venv/bin/python", "runs/nano/metrics.jsonl", "arg_dist/__pycache__/a.pyc"]
    unwanted += [".mypy_cache/a", "arg_dist.egg-info/PKG-INFO", ".env", "launchers/.ruff_cache/a"]
    wheel = "docker/wheelhouse/torch.whl"
    for name in [*unwanted, wheel]:
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_text("")
    file = tmp_path / "Dockerfile"
    file.write_text("FROM scratch\nCOPY . /context/\n")
    options = ["--isolation", "chroot", "--file", file, "--tag", "localhost/context"]
    images.do("build", *options, sources)
    with images.container("localhost/context") as container:
        inside = Path(images.do("mount", container).strip()) / "context"
        tops = {path.name for path in inside.iterdir()}
        assert all(not (inside / name).exists() for name in unwanted)
        assert (inside / wheel).is_file()
    assert tops == {
        "LICENSE", "README.md", "arg_dist", "constraints.txt", "docker", "ds_configs", "launchers",
        "pyproject.toml",
    }  # fmt: skip


def test_an_image_has_what_it_needs_and_nothing_else(
    images: Images, image: str, container: str, tmp_path: Path
) -> None:
    settings = images.settings(image)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert settings["User"] == f"{USER}:{USER}"
    assert settings["Labels"]["org.opencontainers.image.version"] == version
    assert settings["Labels"]["org.opencontainers.image.revision"] == "abc"
    assert settings["Healthcheck"]["Test"] == ["CMD", "python", "docker/healthcheck.py"]
    assert not [name for name in settings["Env"] if "TOKEN" in name or "PASS" in name]

    inside = Path(images.do("mount", container).strip())
    left = [*inside.glob("build/*"), *inside.glob("tmp/*"), *inside.glob("root/.cache")]
    left += [*inside.glob("var/lib/apt/lists/*"), *inside.glob("workspace/*.egg-info")]
    left += [path for top in ("opt", "workspace") for path in (inside / top).rglob("*.whl")]
    assert left == []
    owned = {path.name for path in inside.glob("workspace/*") if path.stat().st_uid == USER}
    assert owned == {"runs"}
    size = int(run(["du", "-sb", inside], seconds=120).split()[0])
    assert size < LARGEST, f"the image has {size / 1e9:.2f} GB"

    asked = [*settings["Entrypoint"], "--help"]
    assert "MASTER_ADDR" in in_a_host(images.start(container, asked), tmp_path / "help")
    user = images.start(container, ["python", "-c", "import os; print(os.getuid())"])
    assert int(in_a_host(user, tmp_path / "user")) == USER


class Job:
    """Starts the image's job on hosts; files lie in `folder`."""

    def __init__(self, images: Images, container: str, entrypoint: list[str], folder: Path) -> None:
        self.images, self.container, self.entrypoint = images, container, entrypoint
        self.folder = folder
        self.data = folder / "data"
        self.data.mkdir()
        write_text(self.data)

    def command(self, run_folder: Path, arguments: list[str], place: dict[str, str]) -> list[str]:
        """The command line of a node, whose runs lie in the new `run_folder`."""
        run_folder.mkdir(parents=True)
        os.chown(run_folder, USER, USER)  # root's alone, as they are, the container cannot write
        folders = {self.data: "/data:ro", run_folder: "/workspace/runs"}
        folders[ROOT / "tests/launch/cpu_fsdp.py"] = f"{ON_CPUS}:ro"
        words = [*self.entrypoint, *arguments, "--out=runs/job"]
        return self.images.start(self.container, words, variables=SETTLED | place, folders=folders)

    def on_one_host(self) -> list[float]:
        """The losses of ZeRO-2 on one process."""
        folder = self.folder / "one"
        arguments = [*JOB, "--deepspeed_config=ds_configs/zero2.json"]
        in_a_host(self.command(folder, arguments, {}), self.folder / "one.log", seconds=1200)
        return losses(folder)

    def on_two_hosts(self, engine: str) -> list[float]:
        """The losses of two hosts with two processes each; the first one is found healthy."""
        nodes = []
        with hosts(2) as pair:
            for index, host in enumerate(pair):
                place = {"NNODES": "2", "NODE_RANK": str(index), "NPROC_PER_NODE": "2"}
                place |= {"MASTER_ADDR": pair[0].address, "MASTER_PORT": "29400"}
                command = self.command(self.folder / engine / str(index), WAYS[engine], place)
                nodes.append(Node(host, command, self.folder / f"{engine}-{index}.log"))
            nodes[0].says("cluster: node 0", seconds=600)
            assert self.health(nodes[0]) == "healthy"
            codes = [node.ends(seconds=1800) for node in nodes]
        assert codes == [0, 0], "\n".join(node.printed()[-4000:] for node in nodes)
        report = json.loads((self.folder / engine / "0/job/report.json").read_text())
        assert (report["engine"], report["world_size"]) == (engine, 4)
        return losses(self.folder / engine / "0")

    def health(self, node: Node) -> str:
        """What the image's health check says of a node that runs."""
        inits = [process for process in node.host.processes() if program(process) == "tini"]
        assert len(inits) == 1
        command = self.images.start(self.container, ["python", "docker/healthcheck.py", *inits])
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=patient(300), check=False
        )
        return finished.stdout.strip() or finished.stderr


def program(process: int) -> str:
    words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    return Path(words[0].decode()).name


def losses(folder: Path) -> list[float]:
    lines = (folder / "job/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def job(
    images: Images, image: str, container: str, tmp_path_factory: pytest.TempPathFactory
) -> Job:
    entrypoint = images.settings(image)["Entrypoint"]
    return Job(images, container, entrypoint, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def one_host(job: Job) -> list[float]:
    return job.on_one_host()


@pytest.mark.parametrize("engine", ["ZeRO-2", "ZeRO-3", "FSDP2"])
def test_two_hosts_train_as_one(engine: str, job: Job, one_host: list[float]) -> None:
    two = job.on_two_hosts(engine)
    assert len(two) == STEPS
    for loss, expected in zip(two, one_host, strict=True):
        LOSSES.check(loss, expected)
