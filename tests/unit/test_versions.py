"""The versions that the tests run with: of everything, and of what builds it."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path

import pytest

from arg_dist.library_internals import ACCELERATE, DEEPSPEED, TORCH, TRANSFORMERS
from tests import versions

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


def test_the_oldest_versions_that_are_promised_are_those_of_the_oldest_row() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = list(project["dependencies"])
    for extra in ("deepspeed", "accelerate", "transformers"):
        asked += project["optional-dependencies"][extra]
    promised = dict(requirement.split(">=") for requirement in asked)
    tested = {**versions.ROWS["oldest"].pins, **EARLIER}
    for name, version in promised.items():
        assert f"{tested[name]}.".startswith(f"{version}."), name
    assert project["requires-python"] == ">=3.11"


EARLIER = {"pydantic": "2.7", "numpy": "1.26", "rich": "13", "safetensors": "0.6"}
"""Lower bounds that all tests passed with beside other versions."""


def test_the_page_is_of_what_was_found_and_the_rows_are_those_that_ran() -> None:
    found = json.loads(versions.FOUND.read_text())
    assert versions.PAGE.read_text() == versions.page(found)
    assert {"newest", "oldest"} <= found.keys() <= versions.ROWS.keys()
    for name, row in found.items():
        assert not row["failed"]
        assert "no" not in map(versions.mark, row["engines"].values())
        pins = versions.ROWS[name].pins
        for library in pins.keys() & set(versions.LIBRARIES):
            assert row["installed"][library].split("+")[0] == pins[library]
        assert row["python"].startswith(f"{versions.ROWS[name].python}.")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    "ARG_DIST_TEST_VERSIONS" not in os.environ,
    reason="each row downloads 3 GB: set ARG_DIST_TEST_VERSIONS=1, or python -m tests.versions",
)
@pytest.mark.parametrize("name", ["newest", "oldest"])
def test_a_row_works_as_the_page_says(name: str) -> None:
    found = json.loads(versions.FOUND.read_text())[name]
    now = versions.tried(name)
    assert not now.failed
    assert {engine: versions.mark(told) for engine, told in now.engines.items()} == {
        engine: versions.mark(told) for engine, told in found["engines"].items()
    }
