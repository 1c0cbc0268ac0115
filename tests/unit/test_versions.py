"""The versions that the tests run with: of everything, and of what builds it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower()


def test_everything_that_is_asked_for_by_name_has_its_version() -> None:
    pinned = {
        name_of(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if re.fullmatch(r"[\w.-]+==[\w.]+", line)
    }
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = content["project"]
    asked = [*content["build-system"]["requires"], *project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        asked += extra
    names = {name_of(requirement) for requirement in asked} - {project["name"]}
    assert len(names) > 20 and not names - pinned
