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
from benchmarks.compare.plan import Rates

OURS = "adarankgrad"

FAMILIES = {
    "adamw": "adamw",
    "galore": "galore",
    "apollo": "apollo",
    "fira": "fira",
    "muon": "muon",
    "normuon": "normuon",
    "soap": "soap",
    "lora": "lora",
    "recommended": OURS,
    "pretraining": OURS,
    "finetuning": OURS,
    "paper": OURS,
}
"""Each method's family, which determines how its optimizer is built."""

_REST = {"rest_betas": (0.9, 0.95)}

PUBLISHED: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.9, 0.95), **_REST},
    "galore": {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std", **_REST},
    "apollo": {
        "update_proj_gap": 200, "scale": 1.0, "proj": "random", "scale_type": "channel",
        "proj_type": "std", **_REST,
    },
    "fira": {"update_proj_gap": 200, "alpha": 1.0, "proj_type": "std", **_REST},
    "muon": {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.9, **_REST},
    "normuon": {"update_scale": "match_rms", "momentum": 0.9, "beta2": 0.95, **_REST},
    "soap": {"betas": (0.95, 0.95), "precondition_frequency": 10, **_REST},
    "lora": {"alpha": 2, "dropout": 0.0},
}  # fmt: skip
"""Settings for the low-rank matrices, as published by each method's authors for pre-training; the
rank is added. LoRA's alpha is a multiple of the rank. Muon's and NorMuon's momentum is 0.9
(published: 0.95). `rest_betas` are those of the AdamW that trains all
other parameters; AdaRankGrad has its own setting `betas` for both."""

PUBLISHED_FINETUNING = {
    **{name: {**own, "rest_betas": (0.9, 0.999)} for name, own in PUBLISHED.items()},
    "adamw": {"betas": (0.9, 0.999), "rest_betas": (0.9, 0.999)},
    "galore": {**PUBLISHED["galore"], "scale": 4.0, "rest_betas": (0.9, 0.999)},
    "lora": PUBLISHED["lora"],
}
"""The same for fine-tuning: AdamW's betas are torch's defaults, unless a variant sets others, and
GaLore's GLUE runs use a different scale."""

WITH_RANK = {"galore", "apollo", "fira", "lora"}

RATES = {
    "adamw": (1e-3, 2e-3, 4e-3),
    "muon": (8e-3, 1.2e-2, 1.6e-2, 2.4e-2),
    "normuon": (8e-3, 1.2e-2, 1.6e-2, 2.4e-2),
    "soap": (1e-3, 2e-3, 4e-3, 8e-3),
    "galore": (5e-3, 1e-2, 2e-2, 4e-2),
    "apollo": (5e-3, 1e-2, 2e-2, 4e-2),
    "fira": (2.5e-3, 5e-3, 1e-2, 2e-2),
    "recommended": (1.2e-2, 1.6e-2, 2.4e-2),
    "pretraining": (8e-3, 1.2e-2, 1.6e-2),
    "paper": (6e-3, 1.2e-2, 2.4e-2, 4.8e-2),
}
"""Default learning rates of the low-rank matrices for pre-training, by method."""

REST_RATES = (8e-3, 1.6e-2, 3.2e-2)
"""Default learning rates of all other parameters for pre-training."""

TWO_OPTIMIZERS = {"muon", "normuon", "soap"}
"""Families that train the low-rank matrices and the rest by an optimizer each."""

ONE_RATE = {"lora"}
"""Families whose parameters all have one learning rate."""

RATES_FINETUNING = {
    **dict.fromkeys((*RATES, "finetuning"), (2.5e-5, 5e-5, 1e-4, 2e-4)),
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
            side; `rest_betas` are those of the AdamW that trains all other parameters.
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
    rest: Sequence[float] = (),
    own_rest: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Rates]:
    """The learning rates of each method by name, ascending.

    Args:
        methods: the methods to compare.
        given: rates of the low-rank matrices by method name, overriding the defaults.
        defaults: default rates by method.
        rest: rates of all other parameters, for every method with two; empty: that of the matrices.
        own_rest: the same by method name, overriding `rest`.

    Raises:
        InputError: a name in `given` is not among `methods`, or the methods have neither the same
            number of rates nor the default numbers, which would favour some.
    """
    names = [method.name for method in methods]
    own = dict(own_rest or {})
    for option, name in [*(("--lrs", each) for each in given), *(("--rest-lr", n) for n in own)]:
        if name not in names:
            raise InputError(f"{option} {name}=...: not among the methods {', '.join(names)}")
    default = {method.name: defaults[method.of] for method in methods}
    rates = {name: tuple(sorted(set(given.get(name, default[name])))) for name in names}
    usual = {name: len(default[name]) for name in names}
    numbers = {name: len(each) for name, each in rates.items()}
    if len(set(numbers.values())) > 1 and numbers != usual:
        raise InputError(
            "--lrs: every method needs the same number of learning rates, got "
            f"{_listed(numbers)}; give all as many, or their default numbers: {_listed(usual)}"
        )
    two = [method.name for method in methods if method.family not in ONE_RATE]
    rests = {name: tuple(sorted(set(own.get(name, rest)))) for name in two}
    numbers = {name: len(each) for name, each in rests.items()}
    if len(set(numbers.values())) > 1:
        raise InputError(
            "--rest-lr: every method needs the same number of learning rates, got "
            f"{_listed(numbers)}"
        )
    return {name: Rates(rates[name], rests.get(name, ())) for name in names}


def _listed(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


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
        else:
            _check_decay_rates(method)


def _check_decay_rates(method: Method) -> None:
    for key, count in (("betas", 2), ("rest_betas", 2), ("momentum", 1)):
        given = method.settings.get(key, (0.0,) * count)
        rates = given if isinstance(given, (list, tuple)) else [given]
        if len(rates) != count or not all(
            isinstance(rate, (int, float)) and 0 <= rate < 1 for rate in rates
        ):
            needed = "two numbers, as [0.9,0.95]," if count == 2 else "a number"
            raise InputError(
                f"--variant {method.name} {key}={given}: expected {needed} of at least 0 and below "
                "1"
            )


def _own_code() -> str:
    """Leading digits of the sha256 of the optimizer's code, ignoring comments and docstrings."""
    package = Path(arg_dist.__file__).parent
    folders = (package, package / "subspace", package / "sharding")
    files = [file for folder in folders for file in folder.glob("*.py")]
    whole = hashlib.sha256()
    for file in sorted(files):
        whole.update(ast.dump(without_docstrings(ast.parse(file.read_text()))).encode())
    return whole.hexdigest()[:12]


def without_docstrings(tree: ast.Module) -> ast.Module:
    """A module without its docstrings, which is changed in place."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                line
                for line in body
                if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            ]
    return tree
