"""The versions that the tests run with: of everything, and of what builds it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from arg_dist.library_internals import ACCELERATE, DEEPSPEED, TORCH, TRANSFORMERS

ROOT = Path(__file__).resolve().parents[2]


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower()


def pinned_versions() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    return {name_of(name): version for name, version in pins}


def test_everything_that_is_asked_for_by_name_has_its_version() -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = content["project"]
    asked = [*content["build-system"]["requires"], *project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        asked += extra
    names = {name_of(requirement) for requirement in asked} - {project["name"]}
    assert len(names) > 20 and not names - set(pinned_versions())


def test_errors_and_constraints_name_the_same_tested_versions() -> None:
    pinned = pinned_versions()
    for library in (TORCH, DEEPSPEED, ACCELERATE, TRANSFORMERS):
        assert library.tested == pinned[library.package]


OLDEST_TESTED = {
    "torch": "2.6",
    "pydantic": "2.7",
    "safetensors": "0.8",
    "numpy": "1.26",
    "rich": "13",
    "deepspeed": "0.19",
    "accelerate": "1.15",
    "transformers": "5",
}
"""The oldest versions that the unit, lockstep and pool tests have passed with; to promise an older
one, run them with it."""


def test_the_oldest_versions_that_are_promised_are_those_that_were_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = list(project["dependencies"])
    for extra in ("deepspeed", "accelerate", "transformers"):
        asked += project["optional-dependencies"][extra]
    promised = dict(requirement.split(">=") for requirement in asked)
    assert promised == OLDEST_TESTED
    assert project["requires-python"] == ">=3.11"
