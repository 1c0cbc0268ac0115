"""The methods to compare: their definitions and default learning rates."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arg_dist
from arg_dist.cli.parsing import InputError, parse_overrides
from arg_dist.config import ConfigError, parse_config
from benchmarks.compare import peers

OURS = "adarankgrad"

FAMILIES = {
    "adamw": "adamw",
    "galore": "galore",
    "apollo": "apollo",
    "fira": "fira",
    "muon": "muon",
    "lora": "lora",
    "recommended": OURS,
    "paper": OURS,
}
"""Each method's family, which determines how its optimizer is built."""

PUBLISHED: dict[str, dict[str, Any]] = {
    "galore": {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    "apollo": {
        "update_proj_gap": 200, "scale": 1.0, "proj": "random", "scale_type": "channel",
        "proj_type": "std",
    },
    "fira": {"update_proj_gap": 200, "alpha": 1.0, "proj_type": "std"},
    "muon": {"adjust_lr_fn": "match_rms_adamw"},
    "lora": {"alpha": 2, "dropout": 0.0},
}  # fmt: skip
"""Settings for the low-rank matrices, as published by each method's authors for pre-training; the
rank is added. LoRA's alpha is a multiple of the rank."""

PUBLISHED_FINETUNING = {**PUBLISHED, "galore": {**PUBLISHED["galore"], "scale": 4.0}}
"""The same for fine-tuning: GaLore's GLUE runs use a different scale."""

WITH_RANK = {"galore", "apollo", "fira", "lora"}

RATES = {
    "adamw": (5e-4, 1e-3, 2e-3, 4e-3),
    "muon": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "galore": (5e-3, 1e-2, 2e-2, 4e-2),
    "apollo": (5e-3, 1e-2, 2e-2, 4e-2),
    "fira": (2.5e-3, 5e-3, 1e-2, 2e-2),
    "recommended": (6e-3, 1.2e-2, 2.4e-2, 4.8e-2),
    "paper": (6e-3, 1.2e-2, 2.4e-2, 4.8e-2),
}
"""Default learning rates for pre-training by method: four, a factor of two apart."""

RATES_FINETUNING = {
    **dict.fromkeys(RATES, (2.5e-5, 5e-5, 1e-4, 2e-4)),
    "lora": (2.5e-4, 5e-4, 1e-3, 2e-3),
}
"""The same for fine-tuning."""


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        name: name in tables; variants have their own.
        family: determines how its optimizer is built.
        settings: settings of the low-rank matrices (for AdaRankGrad, of the whole optimizer),
            without the learning rate. `rank` is an integer, or a fraction of a matrix's shorter
            side.
        of: the method it is a variant of; its own name if it is not a variant.
    """

    name: str
    family: str
    settings: dict[str, Any]
    of: str = ""

    def definition(self) -> dict[str, Any]:
        """Everything that defines the method, including versions, as JSON."""
        definition: dict[str, Any] = {"family": self.family, "settings": self.settings}
        if self.family == OURS:
            every = parse_config(self.settings).model_dump(mode="json", exclude={"lr"})
            return definition | {"every_setting": every, "code": _own_code()}
        return definition | {"versions": peers.version(self.family)}


def choose(
    names: Sequence[str],
    *,
    peer_rank: int | float,
    overrides: Iterable[str] = (),
    variants: Sequence[Sequence[str]] = (),
    known: Collection[str] = tuple(FAMILIES),
    published: Mapping[str, dict[str, Any]] = PUBLISHED,
) -> list[Method]:
    """Resolve the methods by name, followed by the variants.

    Args:
        names: names of methods.
        peer_rank: rank of GaLore, APOLLO, Fira and LoRA.
        overrides: ``key=value`` settings for all AdaRankGrad methods.
        variants: for each, a new name, optionally a method's name (default ``recommended``), then
            ``key=value`` settings.
        known: names of the available methods.
        published: settings by family.

    Raises:
        InputError: a name is unknown or duplicate, a package is not installed, or a setting is
            invalid.
    """
    own = parse_overrides(overrides)

    def method(name: str, of: str, option: str, more: dict[str, Any]) -> Method:
        if of not in known:
            raise InputError(f"{option}: unknown method; choose from {', '.join(known)}")
        family = FAMILIES[of]
        settings = {"preset": of} | own if family == OURS else dict(published.get(family, {}))
        if family in WITH_RANK:
            settings["rank"] = peer_rank
        if unknown := more.keys() - settings.keys() if family != OURS else set():
            raise InputError(
                f"--variant {name} {unknown.pop()}=...: unknown setting; {of} accepts "
                f"{', '.join(settings) or 'none'}"
            )
        return Method(name, family, settings | more, of)

    methods = [method(name, name, f"--methods {name}", {}) for name in names]
    for name, *rest in variants:
        if not re.fullmatch(r"[\w.+-]+", name):
            raise InputError(
                f"--variant {name}: expected a name of letters, digits and . + - _, optionally the "
                "name of a method, then settings (KEY=VALUE)"
            )
        of = rest.pop(0) if rest and "=" not in rest[0] else "recommended"
        methods.append(method(name, of, f"--variant {name} {of}", parse_overrides(rest)))
    _check(methods)
    return methods


def rates_of(
    methods: Sequence[Method],
    given: Mapping[str, Sequence[float]],
    defaults: Mapping[str, Sequence[float]] = RATES,
) -> dict[str, tuple[float, ...]]:
    """The learning rates of each method by name, ascending.

    Args:
        methods: the methods to compare.
        given: rates by method name, overriding the defaults.
        defaults: default rates by method.

    Raises:
        InputError: a name in `given` is not among `methods`, or the methods have different numbers
            of rates, which would favour some.
    """
    names = [method.name for method in methods]
    for name in given:
        if name not in names:
            raise InputError(f"--lrs {name}=...: not among the methods {', '.join(names)}")
    rates = {
        method.name: tuple(sorted(set(given.get(method.name, defaults[method.of]))))
        for method in methods
    }
    if len({len(each) for each in rates.values()}) > 1:
        numbers = ", ".join(f"{name} {len(each)}" for name, each in rates.items())
        raise InputError(
            f"--lrs: every method needs the same number of learning rates, got {numbers}"
        )
    return rates


def _check(methods: Sequence[Method]) -> None:
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--methods, --variant: two methods are named {name}")
    peers.require({method.family for method in methods})
    for method in methods:
        if method.family == OURS:
            try:
                parse_config(method.settings, where=method.name)
            except ConfigError as error:
                raise InputError(str(error)) from None


def _own_code() -> str:
    """Leading digits of the sha256 of the optimizer's code, ignoring comments and docstrings."""
    package = Path(arg_dist.__file__).parent
    folders = (package, package / "subspace", package / "sharding")
    files = [file for folder in folders for file in folder.glob("*.py")]
    whole = hashlib.sha256()
    for file in sorted(files):
        whole.update(ast.dump(_without_docstrings(ast.parse(file.read_text()))).encode())
    return whole.hexdigest()[:12]


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                line
                for line in body
                if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            ]
    return tree
