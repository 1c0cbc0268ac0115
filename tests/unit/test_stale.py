"""Figures that are older than the code they speak of are found, by commit."""

from __future__ import annotations

import subprocess
import warnings
from pathlib import Path

import pytest

from benchmarks.stale import ROOT, Checkout, stale

pytestmark = pytest.mark.unit

RESULTS = """# Steps

| | |
|---|---|
| code | {code} |
| command | `python -m benchmarks.{command}` |
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Code, its figures, and a README that names them."""
    for folder in ("arg_dist/subspace", "arg_dist/sharding", "benchmarks/results", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "arg_dist/subspace/norms.py").write_text('"""Norms."""\n\nONE = 1\n')
    (tmp_path / "arg_dist/sharding/plan.py").write_text("TWO = 2\n")
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    code = f"commit {git(tmp_path, 'rev-parse', '--short', 'HEAD').strip()}, on a quiet machine"
    results(tmp_path, "2026-01-01-step.md", code, "step --models 1b")
    results(tmp_path, "2026-01-02-scaling.md", "the commit that adds this file", "scaling")
    (tmp_path / "README.md").write_text("Fast ([table](benchmarks/results/2026-01-01-step.md)).\n")
    (tmp_path / "docs/page.md").write_text("\nScales: `2026-01-02-scaling.md`.\n")
    commit(tmp_path)
    return tmp_path


def git(folder: Path, *words: str) -> str:
    settings = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *settings, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def commit(folder: Path) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "a change")


def results(folder: Path, name: str, code: str, command: str) -> None:
    (folder / "benchmarks/results" / name).write_text(RESULTS.format(code=code, command=command))


def told(folder: Path) -> list[str]:
    return [str(each) for each in stale(folder)]


def test_figures_are_as_old_as_their_code_until_it_changes(checkout: Path) -> None:
    assert not told(checkout)
    path = checkout / "arg_dist/subspace/norms.py"
    path.write_text('"""Norms of matrices."""\n\nONE = 1  # the first\n')
    commit(checkout)
    assert not told(checkout)  # words alone
    (checkout / "arg_dist/sharding/plan.py").write_text("TWO = 3\n")
    (line,) = told(checkout)  # also what is not committed yet
    assert line.startswith("2026-01-02-scaling.md is of ")
    assert line.endswith(", before changes of arg_dist/sharding/plan.py: docs/page.md:2")
    path.unlink()
    commit(checkout)
    steps, _ = told(checkout)
    assert steps.endswith(", before changes of arg_dist/subspace/norms.py: README.md:1")


def test_figures_of_an_unknown_commit_are_told(checkout: Path) -> None:
    results(checkout, "2026-01-01-step.md", "commit 1234567", "step")
    assert told(checkout) == ["2026-01-01-step.md names no commit of this history: README.md:1"]


def test_a_page_that_names_a_missing_file_is_an_error(checkout: Path) -> None:
    (checkout / "benchmarks/results/2026-01-01-step.md").unlink()
    with pytest.raises(FileNotFoundError, match="2026-01-01-step"):
        told(checkout)


@pytest.mark.skipif(not Checkout(ROOT).order, reason="needs a git checkout")
def test_old_figures_of_this_checkout_are_warned_of() -> None:
    found = list(stale())
    if found:
        warnings.warn(
            f"{len(found)} files of results are older than the code that they speak of: "
            "python -m benchmarks.stale lists them",
            stacklevel=1,
        )
