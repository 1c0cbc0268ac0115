"""README and docs: their code runs, or says why not; links and generated pages are right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.launching import ROOT, launch
from tests.launch.pages import PAGES, RUN, blocks_of, checkout_at
from tests.patience import patient

LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
WITH_PYTHON = [
    page for page in PAGES if any(b.language == "python" and not b.reason for b in blocks_of(page))
]
COMMANDS = [
    pytest.param(block.text, id=f"{page.name}:{block.line}")
    for page in PAGES
    for block in blocks_of(page)
    if block.language == "bash" and not block.reason
]


def each(pages: list[Path]) -> list[object]:
    return [pytest.param(page, id=page.name) for page in pages]


@pytest.mark.parametrize("page", each(WITH_PYTHON))
def test_the_python_of_a_page_runs(page: Path) -> None:
    processes = 2 if page.name == "README.md" else 1
    script = "tests/launch/docs_runs.py"
    finished = launch(script, page, processes=processes, seconds=150, launcher="forked")
    assert finished.returncode == 0, finished.stdout[-1500:] + finished.stderr[-3000:]


@pytest.mark.parametrize("commands", COMMANDS)
def test_the_commands_of_a_page_run(commands: str, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    finished = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=checkout_at(tmp_path), env={**os.environ, "PATH": path}, capture_output=True,
        text=True, timeout=patient(120),
        check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-1500:] + finished.stderr[-3000:]


@pytest.mark.parametrize("page", each(PAGES))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{page.name}: no such file: {missing}"


def test_every_block_has_a_language() -> None:
    known = {*RUN, "json", "yaml", "text", "mermaid", "console", "bibtex"}
    for page in PAGES:
        for block in blocks_of(page):
            assert block.language in known, f"{page}:{block.line}: language {block.language!r}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


@pytest.mark.timeout(240)
@pytest.mark.parametrize("script", ["generate_settings.py", "generate_plans.py"])
def test_generated_pages_are_current(script: str) -> None:
    finished = subprocess.run(
        [sys.executable, ROOT / "docs" / script, "--check"],
        cwd=ROOT, capture_output=True, text=True, timeout=patient(220), check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
