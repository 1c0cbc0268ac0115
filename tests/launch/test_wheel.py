"""The wheel, built as for a release, and installed into an environment that has nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.launch.launching import ROOT
from tests.launch.pages import checkout_at
from tests.patience import patient

REPOSITORY = "https://example.org/owner/arg-dist"
URLS = f"""
[project.urls]
Repository = "{REPOSITORY}"
Issues = "{REPOSITORY}/issues"
Changelog = "{REPOSITORY}/blob/main/CHANGELOG.md"
"""
UNRELEASED = "It is not on PyPI yet"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

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


def checkout(folder: Path, *, ready: bool) -> Path:
    """A checkout with all that a release needs, or without."""
    checkout_at(folder)
    changed = {
        "pyproject.toml": "\n".join(
            table
            for table in re.split(r"\n(?=\[)", (ROOT / "pyproject.toml").read_text())
            if not table.startswith("[project.urls]")
        ),
        "CHANGELOG.md": "# Changelog\n\n## [Unreleased]\n",
        "README.md": (ROOT / "README.md").read_text().replace(UNRELEASED, ""),
    }
    pages = folder / "docs"
    pages.unlink()
    pages.mkdir()
    (pages / "getting-started.md").write_text("" if ready else UNRELEASED)
    if ready:
        changed["pyproject.toml"] += URLS
        changed["CHANGELOG.md"] += f"\n## [{VERSION}] - 2026-12-01\n"
    for name, text in changed.items():
        (folder / name).unlink()
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what a release would upload."""
    out = tmp_path_factory.mktemp("released")
    sources = checkout(tmp_path_factory.mktemp("sources"), ready=True)
    run(sys.executable, ROOT / "docs/release_check.py", sources, "--out", out, folder=out)
    return out


@pytest.fixture(scope="module")
def wheel(released: Path) -> Path:
    (built,) = released.glob("*.whl")
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


def test_pypi_shows_a_page_whose_links_lead_to_the_tag(released: Path, wheel: Path) -> None:
    assert {path.name for path in released.iterdir()} == {
        f"arg_dist-{VERSION}-py3-none-any.whl",
        f"arg_dist-{VERSION}.tar.gz",
    }
    with zipfile.ZipFile(wheel) as archive:
        shown = archive.read(f"arg_dist-{VERSION}.dist-info/METADATA").decode()
    assert f"Project-URL: Repository, {REPOSITORY}" in shown
    assert f"]({REPOSITORY}/raw/v{VERSION}/docs/images/quickstart.png)" in shown
    assert f"]({REPOSITORY}/blob/v{VERSION}/docs/planning-memory.md#gradients-" in shown
    assert f"]({REPOSITORY}/tree/v{VERSION}/launchers/accelerate)" in shown
    assert "](https://arxiv.org/abs/2410.17881)" in shown
    assert not re.search(r"\]\((?!https://)", shown)


def test_what_is_not_ready_is_refused_with_the_remedy(tmp_path: Path) -> None:
    sources, out = tmp_path / "sources", tmp_path / "out"
    sources.mkdir()
    words = (sys.executable, ROOT / "docs/release_check.py", checkout(sources, ready=False))
    told = run(*words, "--out", out, folder=tmp_path, code=1)
    assert "[project.urls] has no Repository, Issues, Changelog; give the public addr" in told
    assert f"no section [{VERSION}]" in told and f"says '{UNRELEASED}'; remove" in told
    assert "links would lead nowhere on PyPI (docs/images/quickstart.png, ...)" in told
    assert not out.exists()


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
