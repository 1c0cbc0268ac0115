"""The wheel, built and installed as pip does it, into an environment that has nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.launch.launching import ROOT
from tests.patience import patient

SOURCES = ("arg_dist", "ds_configs", "pyproject.toml", "README.md", "LICENSE")
"""All that a build reads."""

STEP = """
import torch
import arg_dist
from arg_dist.checkpoint import Checkpoints

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 64))
optimizer = arg_dist.AdaRankGrad(arg_dist.param_groups(model), lr=1e-2, max_rank=8)
before = model[0].weight.detach().clone()
model(torch.randn(16, 64)).square().mean().backward()
optimizer.step()
assert not torch.equal(before, model[0].weight)
assert {entry["rank"] for entry in optimizer.stats()} != {0}
checkpoints = Checkpoints("checkpoints", optimizer, model=model)
checkpoints.save(1)
checkpoints.wait()
assert checkpoints.load("auto").step == 1
"""


def run(*arguments: object, folder: Path, code: int = 0) -> str:
    """Runs a command; returns what it prints, and checks its exit code."""
    finished = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=folder,
        env={
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=patient(280),
        check=False,
    )
    assert finished.returncode == code, finished.stdout[-2000:] + finished.stderr[-4000:]
    return finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: what earlier builds left in the checkout would be packed, too."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy)
    run(*build, folder=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment with the wheel, its dependencies and no extra."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, folder=environment)
    programs = environment / "bin"
    pip = (sys.executable, "-m", "pip", "--python", programs / "python", "install")
    quiet = ("--quiet", "--no-compile", "--disable-pip-version-check")
    run(*pip, *quiet, "--constraint", ROOT / "constraints.txt", wheel, folder=environment)
    return programs


def test_the_wheel_is_the_optimizer(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        lines = sum(len(archive.read(name).splitlines()) for name in names if name.endswith(".py"))
    tops = {name.split("/")[0] for name in names}
    others = {top for top in tops if not top.endswith((".dist-info", ".data"))}
    assert others == {"arg_dist"}
    shipped = {Path(name).name for name in names if "/share/arg_dist/ds_configs/" in name}
    assert shipped == {path.name for path in (ROOT / "ds_configs").iterdir()}
    files = [name for name in names if name.endswith(".py")]
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "arg_dist").rglob("*.py")}
    assert set(files) == there and "arg_dist/py.typed" in names
    told = re.search(r"The wheel has ([\d,]+) lines in (\d+) files", contributing())
    assert told, "CONTRIBUTING.md gives the wheel's size"
    given = int(told[1].replace(",", "")), int(told[2])
    for now, then in zip((lines, len(files)), given, strict=True):
        assert abs(now - then) <= 0.05 * then, f"{now} now; CONTRIBUTING.md says {then}"


def contributing() -> str:
    return " ".join((ROOT / "CONTRIBUTING.md").read_text().split())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_base_install_trains_saves_plans_and_inspects(installed: Path, tmp_path: Path) -> None:
    program = installed / "arg-dist"
    run(installed / "python", "-c", STEP, folder=tmp_path)
    assert "configs|export|inspect|plan" in run(program, "--help", folder=tmp_path)
    assert "intact" in run(program, "inspect", "checkpoints", folder=tmp_path)
    assert "zero3_bf16.json" in run(program, "configs", "mine", folder=tmp_path)
    written = {path.name: path.read_text() for path in (tmp_path / "mine").iterdir()}
    assert written == {path.name: path.read_text() for path in (ROOT / "ds_configs").iterdir()}
    plan = ("plan", "--model", "7b", "--engine", "zero3", "--world-size", 8, "--dtype", "bf16")
    assert "optimizer state" in run(program, *plan, folder=tmp_path)
    absent = run(program, "export", "checkpoints", "out", folder=tmp_path, code=2)
    assert "pip install 'arg-dist[transformers]'" in absent
    (tmp_path / "config.json").write_text("{}")
    path = ("plan", "--model", tmp_path, "--engine", "ddp")
    assert "pip install 'arg-dist[transformers]'" in run(program, *path, folder=tmp_path, code=2)
    script = "import arg_dist; arg_dist.initialize(model=None, config={})"
    absent = run(installed / "python", "-c", script, folder=tmp_path, code=1)
    assert "pip install 'arg-dist[deepspeed]'" in absent
