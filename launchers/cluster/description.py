"""Describes what a node is about to run, and compares it between nodes."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import arg_dist

PACKAGES = ("arg_dist", "deepspeed", "accelerate", "transformers")
CONFIGURATIONS = (".json", ".yaml", ".yml")
ABSENT = "not found"


def describe(
    *,
    nodes: int,
    processes: int,
    launcher: str,
    max_restarts: int,
    command: Sequence[str],
    accelerate_config: str | None,
) -> dict[str, str]:
    """What must be the same on every node, by names that users recognize.

    Args:
        nodes: number of nodes.
        processes: number of processes on each.
        launcher: its name.
        max_restarts: how often it restarts the processes.
        command: the job's script and its arguments.
        accelerate_config: path of accelerate's configuration file.
    """
    files = [command[0], *configurations(command[1:])]
    files += [] if accelerate_config is None else [accelerate_config]
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "torch": torch.__version__,  # with its build, which the metadata may lack
        "source of arg_dist": _source_digest(Path(arg_dist.__file__).parent),
        "source of launchers": _source_digest(Path(__file__).parents[1]),
        "NNODES": str(nodes),
        "NPROC_PER_NODE": str(processes),
        "launcher": launcher,
        "MAX_RESTARTS": str(max_restarts),
        "command": " ".join(command),
        **{f"contents of {name}": digest(Path(name)) for name in files},
    }


def configurations(arguments: Sequence[str]) -> list[str]:
    """The JSON and YAML files in a command line, as ``x.json`` or ``--option=x.json``."""
    values = [text.partition("=")[2] if text.startswith("-") else text for text in arguments]
    return [value for value in values if value.endswith(CONFIGURATIONS)]


def digest(path: Path) -> str:
    """Short sha256 of a file; :data:`ABSENT` if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return ABSENT


def differences(descriptions: Mapping[int, Mapping[str, str]]) -> list[str]:
    """One line for each value in which nodes differ.

    Args:
        descriptions: by the index of the node.
    """
    found = []
    keys = {key: None for values in descriptions.values() for key in values}
    for key in keys:
        holders: dict[str, list[int]] = {}
        for node, values in sorted(descriptions.items()):
            holders.setdefault(values.get(key, ABSENT), []).append(node)
        if len(holders) > 1:
            each = "; ".join(f"{name_nodes(nodes)}: {value}" for value, nodes in holders.items())
            found.append(f"{key}: {each}")
    return found


def name_nodes(nodes: Sequence[int]) -> str:
    """``node 3``, or ``nodes 1, 2``; long lists are truncated."""
    shown = ", ".join(map(str, nodes[:8])) + (f" and {len(nodes) - 8} more" if nodes[8:] else "")
    return f"{'node' if len(nodes) == 1 else 'nodes'} {shown}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _source_digest(folder: Path) -> str:
    """Digest of a folder's sources; a checkout's version number does not change with them."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        total.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]
