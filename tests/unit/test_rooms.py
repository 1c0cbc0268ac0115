"""The rooms of the package, and who may know whom: imports run one way.

`bench` -> `compare` -> `finetuning`, `command`, `cluster`, `network` -> `planning` -> `lm` ->
`report`, `integrations` -> `engines` -> `checkpoint` -> `core` (the optimizer) -> `sharding` ->
`subspace` -> torch, and `config` knows none of them. A room is a folder of `arg_dist`; `core` is
the files beside them; `__main__` stands before `command`.
CONTRIBUTING.md gives the reasons.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

PACKAGE = Path(__file__).resolve().parents[2] / "arg_dist"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 350

MAY_IMPORT = {
    "config": set(),
    "subspace": set(),
    "sharding": {"subspace"},
    "core": {"config", "sharding", "subspace"},
    "checkpoint": {"config", "core", "sharding", "subspace"},
    "engines": {"checkpoint", "config", "core", "sharding", "subspace"},
    "telemetry": {"sharding"},
    "integrations": {"config", "core", "engines", "telemetry"},
    "lm": {"package", "checkpoint", "config", "engines", "integrations", "report", "telemetry"},
    "cluster": {"package", "lm"},
    "command": {"checkpoint", "config", "lm", "planning"},
    "__main__": {"command"},
    "compare": {"package", "config", "core", "finetuning", "integrations", "lm", "report"},
    "finetuning": {"package", "config", "integrations", "lm", "report", "telemetry"},
    "network": {"lm", "report"},
    "bench": {"package", "compare", "lm", "network", "report", "sharding"},
    "planning": {
        "package",
        "config",
        "core",
        "lm",
        "report",
        "sharding",
        "subspace",
        "telemetry",
    },
    "report": {"telemetry"},
    "package": {"checkpoint", "config", "core", "engines", "integrations", "sharding"},
}
THIRD_PARTY = {
    "config": {"pydantic"},
    "subspace": {"torch"},
    "sharding": {"torch"},
    "core": {"torch"},
    "checkpoint": {"numpy", "pydantic", "safetensors", "torch"},
    "package": set(),
}
"""Rooms that are not listed may import any package."""
PEERS = {"galore_torch", "apollo_torch", "fira", "peft"}
WITHOUT_PROCESSES = {"checkpoint", "config", "core", "package", "subspace"}
WITHOUT_ENGINES = {"checkpoint", "core", "sharding", "subspace"}
ENGINE_NAMES = re.compile(r"(?i:(?<![a-z])(deepspeed|fsdp\d?|accelerate|trainer)(?![a-z]))|ZeRO")
"""Names of engines; in lower case, zero is a number."""


def room_of(module: str) -> str:
    """The room of a dotted module of the package."""
    _, _, inside = module.partition(".")
    first = inside.partition(".")[0]
    if first in MAY_IMPORT:
        return first
    return "core" if first else "package"


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (full_name(node.module or "", alias.name) for alias in node.names)


def full_name(module: str, name: str) -> str:
    """`module.name` where the name is a module itself, as in `from arg_dist import config`."""
    path = PACKAGE.parent.joinpath(*module.split("."), name)
    is_module = path.is_dir() or path.with_suffix(".py").exists()
    return f"{module}.{name}" if is_module or module == "torch" else module


def each(*, room: set[str] | None = None) -> list[object]:
    chosen = [path for path in FILES if room is None or room_of(module_of(path)) in room]
    return [pytest.param(path, id=str(path.relative_to(PACKAGE))) for path in chosen]


@pytest.mark.parametrize("path", each())
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(module_of(path))
    allowed = {room} | MAY_IMPORT[room]
    for name in imports(path):
        if name.partition(".")[0] == "arg_dist":
            assert room_of(name) in allowed, f"{room} may not import {name}"


@pytest.mark.parametrize("path", each(room=set(THIRD_PARTY)))
def test_the_core_depends_on_torch_and_pydantic_only(path: Path) -> None:
    room = room_of(module_of(path))
    allowed = {"arg_dist"} | THIRD_PARTY[room] | sys.stdlib_module_names
    assert {name.partition(".")[0] for name in imports(path)} <= allowed


@pytest.mark.parametrize("path", each())
def test_other_optimizers_are_known_where_they_are_compared_alone(path: Path) -> None:
    found = {name.partition(".")[0] for name in imports(path)} & PEERS
    # they may be imported by their name as a text, too
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & PEERS
    assert not found or room_of(module_of(path)) == "compare", f"names {found}"


@pytest.mark.parametrize("path", each(room=WITHOUT_PROCESSES))
def test_only_sharding_and_engines_talk_to_other_processes(path: Path) -> None:
    assert not [name for name in imports(path) if name.startswith("torch.distributed")]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "torch.distributed", f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", each(room=WITHOUT_ENGINES))
def test_the_core_names_no_engine(path: Path) -> None:
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        named = ENGINE_NAMES.search(token.string.replace("_", " "))
        assert not named, f"{path}:{token.start[0]}: names the engine {named}"


@pytest.mark.parametrize("path", each())
def test_a_file_is_a_room_of_moderate_size(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST, f"{path.name} has {lines} lines; split it"


def test_importing_the_package_imports_no_engine() -> None:
    script = (
        "import sys, arg_dist\n"
        "heavy = {'deepspeed', 'accelerate', 'transformers', 'matplotlib', 'datasets', 'peft'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=50)
