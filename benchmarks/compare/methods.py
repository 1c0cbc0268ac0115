"""The methods that are compared: what each of them is, and where its learning rates lie."""

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
"""Each method's family, which says how its optimizer is built."""

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
"""Settings of the low-rank matrices, as each method's authors give them for pre-training; the rank
comes to it. LoRA's alpha is in ranks."""

PUBLISHED_FINETUNING = {**PUBLISHED, "galore": {**PUBLISHED["galore"], "scale": 4.0}}
"""The same for fine-tuning: GaLore's runs on GLUE have another scale."""

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
"""Four learning rates for pre-training, a factor of two apart, by method."""

RATES_FINETUNING = {
    **dict.fromkeys(RATES, (2.5e-5, 5e-5, 1e-4, 2e-4)),
    "lora": (2.5e-4, 5e-4, 1e-3, 2e-3),
}
"""The same for fine-tuning."""


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: its name in tables; a variant has a name of its own.
        family: how its optimizer is built.
        settings: of the low-rank matrices (or of the whole optimizer, for our own); the learning
            rate comes to it. `rank` is a number, or a fraction of a matrix's shorter side.
        of: the method that it is a variant of; its own name for one that is none.
    """

    name: str
    family: str
    settings: dict[str, Any]
    of: str = ""

    def definition(self) -> dict[str, Any]:
        """All that makes this method what it is, versions included, as JSON."""
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
    """The methods by their names, then their variants.

    Args:
        names: of methods.
        peer_rank: the rank of GaLore, APOLLO, Fira and LoRA.
        overrides: ``key=value`` for each of our own methods.
        variants: a new name each, then that of a method (without it, ``recommended``), then
            ``key=value``.
        known: methods that can be asked for.
        published: settings by family.

    Raises:
        InputError: a name is not known or occurs twice, a package is not installed, or a setting
            is refused.
    """
    own = parse_overrides(overrides)

    def method(name: str, of: str, option: str, more: dict[str, Any]) -> Method:
        if of not in known:
            raise InputError(f"{option}: not known; there are {', '.join(known)}")
        family = FAMILIES[of]
        settings = {"preset": of} | own if family == OURS else dict(published.get(family, {}))
        if family in WITH_RANK:
            settings["rank"] = peer_rank
        if unknown := more.keys() - settings.keys() if family != OURS else set():
            raise InputError(
                f"--variant {name} {unknown.pop()}=...: {of} knows {', '.join(settings) or 'none'}"
            )
        return Method(name, family, settings | more, of)

    methods = [method(name, name, f"--methods {name}", {}) for name in names]
    for name, *rest in variants:
        if not re.fullmatch(r"[\w.+-]+", name):
            raise InputError(
                f"--variant {name}: a name of letters, digits and . + - _ is needed first, then "
                "perhaps a method's, then settings (KEY=VALUE)"
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
    """The learning rates of each method, ascending, by its name.

    Args:
        methods: what is compared.
        given: rates by a method's name, in place of the defaults.
        defaults: rates by method.

    Raises:
        InputError: `given` names no method of `methods`; or the methods have not the same number
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
            raise InputError(f"--methods, --variant: two methods have the name {name}")
    peers.require({method.family for method in methods})
    for method in methods:
        if method.family == OURS:
            try:
                parse_config(method.settings, where=method.name)
            except ConfigError as error:
                raise InputError(str(error)) from None


def _own_code() -> str:
    """The first digits of the sha256 of the optimizer's code; comments do not count."""
    package = Path(arg_dist.__file__).parent
    rooms = (package, package / "subspace", package / "sharding")
    files = [file for room in rooms for file in room.glob("*.py")]
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
