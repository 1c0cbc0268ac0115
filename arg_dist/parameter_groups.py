"""Converts torch parameter groups to settings and layout specifications."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import zip_longest
from typing import Any

from torch import Tensor

from arg_dist.config import (
    RENAMED,
    AdaRankGradConfig,
    ConfigError,
    current_names,
    following_gaps,
    parse_config,
    plain,
)
from arg_dist.group_keys import numbers, own_settings, tensors
from arg_dist.parameter_kinds import check_kind, check_present, check_shape, check_values
from arg_dist.settings import JobSettings, PatternSettings
from arg_dist.sharding.fragment import Holding, ParameterGroup, hold
from arg_dist.sharding.layout import GroupSpec, MatrixView, matrix_views
from arg_dist.uses import invented_name

SETTINGS = tuple(AdaRankGradConfig.model_fields)
"""Keys of a parameter group that are settings."""
BUT_LR = tuple(key for key in SETTINGS if key != "lr")
PLAIN = frozenset({bool, int, float, str, type(None)})
"""Types of the values, or of those in a tuple, that validation leaves."""


OF_ALL = frozenset(JobSettings.__annotations__ | PatternSettings.__annotations__)
"""Settings that apply to the optimizer as a whole; a group cannot have others."""


def complete_group(
    param_group: Mapping[str, Any], position: int, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """A parameter group with all settings: its own, else the optimizer's; and with names.

    To a gap between refreshes that the group has, the optimizer's give way like defaults.

    Args:
        param_group: the group as the user gave it.
        position: its position in the optimizer.
        defaults: the optimizer's settings.

    Raises:
        ConfigError: a setting of the group is misspelled or invalid.
        TypeError: the parameters are a set.
    """
    where = f"parameter group {position}"
    group = current_names(param_group, where)
    params = group["params"]
    if isinstance(params, set):
        raise TypeError(f"{where}: got a set, which is unordered; use a list")
    group["params"] = [params] if isinstance(params, Tensor) else list(params)
    own = own_settings(group, where)
    gaps = following_gaps(numbers(own, where), numbers(defaults))
    chosen = {**{key: defaults[key] for key in SETTINGS}, **gaps, **own}
    config = parse_config(numbers(chosen, where), where)
    for key in own.keys() & OF_ALL:
        if getattr(config, key) != defaults[key]:
            raise ConfigError(
                f"{where}.{key}: applies to the optimizer as a whole; pass it to the optimizer, "
                "not in a group"
            )
    group.update({**dict(config), **tensors(chosen)})
    first = group["params"][0] if group["params"] else None
    if not isinstance(first, tuple) and "param_names" not in group:
        count = len(group["params"])
        group["param_names"] = [invented_name(position, i) for i in range(count)]
    return group


def checked_last(groups: list[dict[str, Any]], known: Iterable[str]) -> dict[str, Any]:
    """The group that was added last; removed again if one of its parameters is refused.

    Args:
        groups: the optimizer's groups.
        known: names of the parameters of the earlier ones.

    Raises:
        ConfigError: a name occurs twice, or a parameter cannot be trained.
    """
    names, group = set(known), groups[-1]
    try:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if name in names:
                raise ConfigError(
                    f"parameter group {len(groups) - 1}: the parameter name {name!r} occurs twice"
                )
            names.add(name)
            check_kind(name, parameter)
    except ConfigError:
        groups.pop()
        raise
    return group


def settings_of(group: Mapping[str, Any]) -> AdaRankGradConfig:
    """A group's current settings: schedulers change the learning rate between steps."""
    if RENAMED.keys().isdisjoint(group):
        lr, values = group["lr"], [group[key] for key in BUT_LR]
        if type(lr) is float and all(map(_is_plain, values)):
            return _settings(*values).model_copy(update={"lr": lr})
    named = current_names(group, "parameter group")
    converted = numbers({key: named[key] for key in SETTINGS})
    return AdaRankGradConfig.model_construct(**{**converted, "lr": float(converted["lr"])})


def _is_plain(value: Any) -> bool:
    """Whether a setting is as validation leaves it: neither converted nor changed in place."""
    return type(value) in PLAIN or (type(value) is tuple and PLAIN.issuperset(map(type, value)))


@lru_cache(maxsize=64, typed=True)
def _settings(*values: Any) -> AdaRankGradConfig:
    """The settings of these values in the order of BUT_LR."""
    return AdaRankGradConfig.model_construct(**dict(zip(BUT_LR, values, strict=True)))


def settings_text(settings: AdaRankGradConfig) -> str:
    """The settings as text, by which processes compare them."""
    return "; ".join(f"{key}={value!r}" for key, value in settings)


def group_spec(
    group: ParameterGroup,
    settings: AdaRankGradConfig,
    full_rank: frozenset[str],
    positions: Mapping[str, int],
) -> GroupSpec:
    """Specify one group for the layout: its fragments, and which of them contain matrices.

    Args:
        group: the group's tensors and names.
        settings: the group's settings.
        full_rank: names of parameters trained by full-rank Adam whatever their shape.
        positions: index of each parameter in the list that the group was built with.
    """
    for name, parameter in group.alive():
        check_shape(name, parameter)
    are_named = len(group.names) == len(group.targets)  # not if an engine has flattened them
    for position, target in enumerate(group.targets):
        check_present(group.names[position if are_named else 0], target)
    holding = hold(group)
    _check_trainable(holding)
    for fragment in holding.fragments:
        check_values(fragment.name, fragment.target)
    # complex numbers are trained as pairs of reals, which form no matrix
    pairs = {fragment.name for fragment in holding.fragments if fragment.target.is_complex()}

    def views(name: str, shape: tuple[int, ...]) -> list[MatrixView]:
        return [] if name in full_rank | pairs else trained_views(name, shape, settings)

    terms = False
    if settings.gradient_sync == "sketch":
        holding, terms = _with_all_terms(holding, group, settings)
    return GroupSpec(
        holding=holding,
        side=settings.side,
        shard_basis=settings.shards_basis(terms=terms),
        positions=positions,
        views=views,
        settings=settings_text(settings),
        largest_rank=lambda short: settings.rank_bounds(short)[1],
        goes_home=settings.goes_home,
        terms=terms,
    )


def _with_all_terms(
    holding: Holding, group: ParameterGroup, settings: AdaRankGradConfig
) -> tuple[Holding, bool]:
    """The processes whose gradients are terms of a mean, and whether there is more than one term.

    Raises:
        ConfigError: the processes shard one copy of the model, or the engine averages the gradients
            of several.
    """
    if not holding.replicated and group.process_group is not None:
        copies = None if holding.copies else holding.in_copies(group.process_group)
        if copies is None:
            raise ConfigError(
                'gradient_sync="sketch": the engine shards the model over all processes, or '
                "averages the gradients of its copies; leave the model whole on each process, or "
                'shard it over those of a node only (fully_shard(model, mesh=mesh["shard"]), '
                'of a mesh with the axes "replicate" and "shard"), or leave gradient_sync at '
                '"engine"'
            )
        check_copies(settings)
        return copies, True
    return holding, holding.group is not None or settings.gradient_budget is not None


def check_copies(settings: AdaRankGradConfig) -> None:
    """Check the settings with which several copies of a sharded model are trained.

    Raises:
        ConfigError: they cannot work.
    """
    if settings.residual == "matched":
        raise ConfigError(
            'gradient_sync="sketch": residual="matched" needs the norms of whole rows, '
            'which are cut in a model that is sharded; use residual="orthogonalized" or "none"'
        )
    if settings.gradient_budget is not None:
        raise ConfigError(
            "gradient_budget: the engine sums the gradients of a copy of the model that it shards, "
            "and needs them whole; leave it out, or leave the model whole on each process"
        )


def _check_trainable(holding: Holding) -> None:
    """Check that the tensors held can be changed by a step.

    Raises:
        ConfigError: one cannot, whose name the message has.
    """
    for fragment in holding.fragments:
        if fragment.target.is_inference():
            raise ConfigError(
                f"{fragment.name}: was created in torch.inference_mode(), and such a tensor cannot "
                "be trained; build or load the model outside of it (torch.no_grad() is fine)"
            )


def trained_views(
    name: str, shape: tuple[int, ...], settings: AdaRankGradConfig
) -> list[MatrixView]:
    """The matrices of a parameter that are trained low-rank; empty if full-rank Adam trains it."""
    found = matrix_views(name, shape, settings.view) if settings.low_rank else []
    # if all directions may be kept, plain Adam needs less memory
    saves = found and settings.rank_bounds(found[0].short)[1] < found[0].short
    return found if saves else []


def members(groups: Iterable[Mapping[str, Any]]) -> list[Any]:
    """All members of the groups, in order: tensors, or their indexes in a saved state."""
    return [member for group in groups for member in group["params"]]


def without_arrays(group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group with Python's numbers in place of NumPy's, which safe readers refuse.

    A tensor, such as a learning rate, stays one.
    """
    numbers = {
        key: plain(value)
        for key, value in group.items()
        if not isinstance(value, Tensor)
        and (key in SETTINGS or getattr(value, "shape", None) == ())
    }
    return {**group, **numbers}


def keep_newer(groups: list[dict[str, Any]], before: list[dict[str, Any]]) -> None:
    """Give groups that were loaded the keys that are newer than the saved state."""
    for group, old in zip(groups, before, strict=True):
        for key, value in old.items():
            group.setdefault(key, value)


def check_names(current: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Check that saved groups have the optimizer's parameter names.

    Raises:
        ConfigError: the names differ; the message has the first difference.
    """
    ours = [name for group in current for name in group["param_names"]]
    theirs = [name for group in saved for name in group.get("param_names", ())]
    for mine, other in zip_longest(ours, theirs):
        if mine != other:
            raise ConfigError(
                f"load_state_dict: the saved state has parameter {other!r} where the optimizer has "
                f"{mine!r}; build the optimizer with the parameter names used at saving"
            )
