"""Write the DeepSpeed configurations that are shipped with the package."""

from __future__ import annotations

import shutil
from importlib.metadata import files
from pathlib import Path

from arg_dist.cli.parsing import InputError

FOLDER = "ds_configs"


def write_configs(folder: str | Path) -> list[Path]:
    """Copy the configurations, and the page about their keys, into a directory.

    Args:
        folder: the directory; created if it does not exist.

    Returns:
        The files written.

    Raises:
        InputError: one of them exists already, or they cannot be found or written.
    """
    folder, found = Path(folder), shipped()
    if not found:
        raise InputError(f"configs: {FOLDER} was not installed; install arg-dist from its wheel")
    taken = [path.name for path in found if (folder / path.name).exists()]
    if taken:
        raise InputError(f"{folder / taken[0]}: exists; give another directory, or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copy(path, folder / path.name)) for path in found]
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None


def shipped() -> list[Path]:
    """The files, of the wheel or else of the checkout that the package is imported from."""
    installed = [
        Path(str(path.locate())) for path in files("arg-dist") or () if FOLDER in path.parts
    ]
    beside = Path(__file__).resolve().parents[2] / FOLDER
    return sorted(path for path in installed or beside.glob("*.*") if path.is_file())
