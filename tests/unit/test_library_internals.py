"""Internals of other libraries: all of them in one file, and in the installed versions."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matrices import gaussian
from one_process import optimizer_of

from arg_dist import library_internals
from arg_dist.library_internals import (
    ACCELERATE,
    DEEPSPEED,
    LIBRARIES,
    TORCH,
    UNDOCUMENTED,
    Internal,
)
from tests.library_objects import NAMED, missing
from tests.patience import patient

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "arg_dist/library_internals.py"
FILES = [
    path
    for folder in ("arg_dist", "launchers", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != TABLE
]

DOCUMENTED = {"_asdict", "_exit", "_fields", "_getframe", "_replace"}
"""Public in spite of the underscore: of named tuples, ``os`` and ``sys``."""
STORES = {f"torch._C._distributed_c10d.{name}" for name in ("PrefixStore", "Store", "TCPStore")}
"""Public as names of ``torch.distributed``, where they have no types."""


@pytest.mark.timeout(240)
def test_the_installed_versions_have_all_of_them() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "tests.library_objects"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patient(230),
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]


def test_what_is_missing_is_told_with_the_feature_that_breaks() -> None:
    gone = [
        Internal(TORCH, "torch.nn.Module", "_gone", "a feature"),
        Internal(TORCH, "torch.nn.gone", "Gone", "another"),
    ]
    first, second = missing([*gone, NAMED["UNSAVED_BUFFERS"]])
    assert re.match(r"torch 2.*\(tested: 2.*\): torch.nn.Module has no _gone .*a feature", first)
    assert "torch.nn.gone has no Gone (AttributeError" in second and "another" in second
    with pytest.raises(RuntimeError, match=r"torch: Tensor has no _gone in .*tested: 2\.13\.0"):
        gone[0].of(torch.ones(1))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def defined_in(path: Path) -> frozenset[str]:
    """Private names of classes and modules that a file defines."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return frozenset(filter(is_private, found))


def uses_of_others(path: Path) -> Iterator[str]:
    """Private names in a file that are not our own."""
    tabled = {internal.name for internal in NAMED.values() if is_private(internal.name)}
    everywhere = frozenset[str]().union(*map(defined_in, FILES))
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            by_itself = ast.unparse(node.value) in ("self", "cls")
            own = everywhere - tabled if by_itself else frozenset()
            if by_itself or node.attr not in tabled:
                own |= defined_in(path)
            if node.attr not in own | DOCUMENTED:
                yield f"{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Constant) and node.value in tabled:
            yield f"{node.lineno}: {node.value!r}"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            names = [f"{module}.{each.name}" if module else each.name for each in node.names]
            for name in {*names} - STORES:
                if any(map(is_private, name.split("."))):
                    yield f"{node.lineno}: import of {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_of_others_are_in_the_table_alone(path: Path) -> None:
    found = list(uses_of_others(path))
    assert not found, f"{path}: {found}: take it from arg_dist/library_internals.py"


def test_all_that_is_in_the_table_is_used() -> None:
    imported = {
        alias.name
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom) and node.module == "arg_dist.library_internals"
        for alias in node.names
    }
    assert set(NAMED) <= imported
    words = {word for path in FILES for word in re.findall(r"\w+", path.read_text())}
    assert {internal.name for internal in UNDOCUMENTED} <= words


def test_the_table_has_each_name_once() -> None:
    everything = [*NAMED.values(), *UNDOCUMENTED]
    assert len({(each.owner, each.name) for each in everything}) == len(everything)


def test_engines_know_nothing_of_the_libraries_that_drive_them() -> None:
    for path in FILES:
        layer = path.relative_to(ROOT).parts[1]
        if layer in ("engines", "integrations"):
            assert "sys.modules" not in path.read_text(), f"{path}: use Internal.if_imported"
        if layer == "engines":
            for node in ast.walk(tree_of(path)):
                internal = NAMED.get(node.id) if isinstance(node, ast.Name) else None
                assert internal is None or internal.library in (TORCH, DEEPSPEED), path


def test_a_library_that_is_too_old_is_told_with_the_version_that_is_needed(monkeypatch) -> None:
    accelerate = replace(ACCELERATE, oldest="99.1")
    monkeypatch.setattr(library_internals, "LIBRARIES", [TORCH, accelerate])
    monkeypatch.delitem(sys.modules, "accelerate", raising=False)
    optimizer_of(gaussian(4, 3))
    monkeypatch.setitem(sys.modules, "accelerate", ModuleType("accelerate"))
    with pytest.raises(RuntimeError, match=r"accelerate .* at least 99\.1: pip install 'accelera"):
        optimizer_of(gaussian(4, 3))


def test_the_oldest_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["deepspeed"], *extras["accelerate"]]
    for library in LIBRARIES:
        assert f"{library.package}>={library.oldest}" in [*needed, *extras["transformers"]]
