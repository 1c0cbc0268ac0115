"""Import the other optimizers from their authors' installed packages."""

from __future__ import annotations

import sys
from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from arg_dist.cli.parsing import InputError

PACKAGES = {
    "galore": "galore-torch",
    "apollo": "apollo-torch",
    "fira": "fira",
    "soap": "pytorch_optimizer",
    "normuon": "pytorch_optimizer",
    "lora": "peft",
}
"""The distribution that provides a family of methods; other families need none."""

_MODULES = {"galore-torch": "galore_torch", "apollo-torch": "apollo_torch"}


def require(families: set[str]) -> None:
    """Check that the packages of all `families` are installed.

    Raises:
        InputError: some are not; the message includes the command that installs them.
    """
    wanted = sorted({PACKAGES[family] for family in families if family in PACKAGES})
    missing = [name for name in wanted if find_spec(_MODULES.get(name, name)) is None]
    if missing:
        raise InputError(
            f"--methods: {', '.join(missing)} not installed; run python -m pip install --no-deps "
            f"{' '.join(missing)} (or bash benchmarks/setup_compare.sh), or omit the methods"
        )


def version(family: str) -> dict[str, str]:
    """Name and version of the distribution that provides `family`; empty if it needs none."""
    name = PACKAGES.get(family)
    return {} if name is None else {name: metadata.version(name)}


def published(package: str, module: str, name: str) -> Any:
    """Import `name` from ``package.module`` without running the package's ``__init__``.

    The ``__init__`` of galore_torch and apollo_torch imports bitsandbytes, which is not used here;
    that of pytorch_optimizer, optimizers from packages that happen to be installed.

    Args:
        package: an installed package, see :func:`require`.
        module: a module in it.
        name: the attribute to return.
    """
    if package not in sys.modules:
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations is not None, package
        bare = ModuleType(package)
        bare.__spec__ = spec
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = bare
    return getattr(import_module(f"{package}.{module}"), name)
