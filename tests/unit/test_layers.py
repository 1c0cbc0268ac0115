"""The layers of the checkout, and what may import what: imports run one way.

In the package: `cli` -> `planning`, `integrations` -> `engines` -> `checkpoint` -> `core` (the
optimizer) -> `sharding` -> `subspace` -> torch; `config` and `library_internals` import none of
them. A layer is a folder of `arg_dist`; `core` is the files next to them. Around it: `benchmarks`
-> `launchers` -> package, and the package imports neither. CONTRIBUTING.md gives the reasons.
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

from tests.patience import patient

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "arg_dist"
FILES = sorted(PACKAGE.rglob("*.py"))
AROUND = sorted(
    path for layer in ("launchers", "benchmarks") for path in (ROOT / layer).rglob("*.py")
)
RIG = ROOT / "tests/hosts/namespaces.py"

MAY_IMPORT = {
    "config": set(),
    "library_internals": set(),
    "subspace": {"library_internals"},
    "sharding": {"library_internals", "subspace"},
    "core": {"config", "library_internals", "sharding", "subspace", "telemetry"},
    "checkpoint": {"config", "core", "library_internals", "sharding", "subspace"},
    "engines": {"checkpoint", "config", "core", "library_internals", "sharding", "subspace"},
    "telemetry": {"sharding", "subspace"},
    "integrations": {"config", "core", "engines", "library_internals", "telemetry"},
    "planning": {"config", "core", "library_internals", "sharding", "subspace", "telemetry"},
    "cli": {"checkpoint", "config", "planning", "subspace"},
    "__main__": {"cli"},
    "package": {"checkpoint", "config", "core", "engines", "integrations", "sharding"},
}
PACKAGE_LAYERS = set(MAY_IMPORT)
MAY_IMPORT |= {
    "launchers.cluster": PACKAGE_LAYERS,
    "launchers.reporting": PACKAGE_LAYERS,
    "launchers.pretraining": PACKAGE_LAYERS | {"launchers.reporting"},
    "launchers.finetuning": PACKAGE_LAYERS | {"launchers.pretraining", "launchers.reporting"},
    "launchers": PACKAGE_LAYERS
    | {"launchers.pretraining", "launchers.finetuning", "launchers.reporting"},
}
JOBS = {layer for layer in MAY_IMPORT if layer.startswith("launchers.")}
RIG_LAYER = "tests.hosts"
MAY_IMPORT |= {
    "benchmarks.compare": PACKAGE_LAYERS | JOBS,
    "benchmarks.network": PACKAGE_LAYERS | JOBS | {RIG_LAYER},
    "benchmarks.measuring": PACKAGE_LAYERS | JOBS | {"benchmarks.compare", RIG_LAYER},
    "benchmarks": PACKAGE_LAYERS
    | JOBS
    | {"benchmarks.compare", "benchmarks.measuring", "benchmarks.network", RIG_LAYER},
    RIG_LAYER: set(),
}
THIRD_PARTY = {
    "config": {"pydantic"},
    "library_internals": set(),
    "subspace": {"torch"},
    "sharding": {"torch"},
    "core": {"torch"},
    "checkpoint": {"numpy", "pydantic", "safetensors", "torch"},
    "package": set(),
    RIG_LAYER: set(),
}
"""Layers that are not listed may import any package."""
OPTIONAL = {"arg_dist.subspace.grouped_kernels": {"triton"}}
"""Modules that are imported only where a package is installed."""
PEERS = {"galore_torch", "apollo_torch", "fira", "peft", "pytorch_optimizer"}
WITHOUT_PROCESSES = {"checkpoint", "config", "core", "package", "subspace"}
WITHOUT_ENGINES = {"checkpoint", "core", "sharding", "subspace"}
ENGINE_NAMES = re.compile(r"(?i:(?<![a-z])(deepspeed|fsdp\d?|accelerate|trainer)(?![a-z]))|ZeRO")
"""Names of engines; in lower case, zero is a number."""


def layer_of(module: str) -> str:
    """The layer of a dotted module of the checkout."""
    top, _, inside = module.partition(".")
    first = inside.partition(".")[0]
    if top == "arg_dist":
        return first if first in PACKAGE_LAYERS else "core" if first else "package"
    return f"{top}.{first}" if f"{top}.{first}" in MAY_IMPORT else top


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
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
    path = ROOT.joinpath(*module.split("."), name)
    is_module = path.is_dir() or path.with_suffix(".py").exists()
    return f"{module}.{name}" if is_module or module == "torch" else module


def each(*, layer: set[str] | None = None) -> list[object]:
    everything = [*FILES, *AROUND, RIG]
    chosen = [path for path in everything if layer is None or layer_of(module_of(path)) in layer]
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in chosen]


@pytest.mark.parametrize("path", each())
def test_imports_run_one_way(path: Path) -> None:
    layer = layer_of(module_of(path))
    allowed = {layer} | MAY_IMPORT[layer]
    for name in imports(path):
        if name.partition(".")[0] in ("arg_dist", "launchers", "benchmarks", "tests"):
            assert layer_of(name) in allowed, f"{layer} may not import {name}"


@pytest.mark.parametrize("path", each(layer=set(THIRD_PARTY)))
def test_the_core_depends_on_torch_and_pydantic_only(path: Path) -> None:
    layer = layer_of(module_of(path))
    allowed = {"arg_dist"} | THIRD_PARTY[layer] | sys.stdlib_module_names
    allowed |= OPTIONAL.get(module_of(path), set())
    assert {name.partition(".")[0] for name in imports(path)} <= allowed


@pytest.mark.parametrize("path", each())
def test_other_optimizers_are_known_where_they_are_compared_alone(path: Path) -> None:
    found = {name.partition(".")[0] for name in imports(path)} & PEERS
    # they may be imported by their name as a text, too
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & PEERS
    exported = {"peft"} if module_of(path) == "arg_dist.cli.adapter" else set()
    compared = layer_of(module_of(path)) == "benchmarks.compare"
    assert found <= exported or compared, f"names {found}"


@pytest.mark.parametrize("path", each(layer=WITHOUT_PROCESSES))
def test_only_sharding_and_engines_talk_to_other_processes(path: Path) -> None:
    assert not [name for name in imports(path) if name.startswith("torch.distributed")]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "torch.distributed", f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", each(layer=WITHOUT_ENGINES))
def test_the_core_names_no_engine(path: Path) -> None:
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        named = ENGINE_NAMES.search(token.string.replace("_", " "))
        assert not named, f"{path}:{token.start[0]}: names the engine {named}"


def test_the_simple_optimizer_shares_only_the_codes_of_its_state_with_what_it_verifies() -> None:
    used = set(imports(PACKAGE / "simple.py"))
    shared = {name for name in used if layer_of(name) == "subspace"}
    assert shared == {"arg_dist.subspace.codes"}
    assert "arg_dist.algorithm" not in used


def test_every_adapter_is_in_the_list_that_the_lower_layers_are_given() -> None:
    from arg_dist.engines import ADAPTERS
    from arg_dist.sharding.fragment import Adapter, adapters

    written = {each for each in Adapter.__subclasses__() if each.__module__.startswith("arg_dist")}
    assert {type(adapter) for adapter in ADAPTERS} == written
    assert adapters() == ADAPTERS


def test_importing_the_package_imports_no_engine() -> None:
    script = (
        "import sys, arg_dist\n"
        "heavy = {'deepspeed', 'accelerate', 'transformers', 'matplotlib', 'datasets', 'peft'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=patient(50))
