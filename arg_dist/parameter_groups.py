"""Converts torch parameter groups to settings and layout specifications."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import zip_longest
from typing import Any

from torch import Tensor

from arg_dist.config import AdaRankGradConfig, ConfigError, plain
from arg_dist.sharding.fragment import Holding, ParameterGroup, hold
from arg_dist.sharding.layout import MatrixView, matrix_views
from arg_dist.sharding.plan import GroupSpec

SETTINGS = tuple(AdaRankGradConfig.model_fields)
"""Keys of a parameter group that are settings."""


def settings_of(group: Mapping[str, Any]) -> AdaRankGradConfig:
    """A group's current settings: schedulers change the learning rate between steps."""
    values = {key: plain(group[key]) for key in SETTINGS}
    lr = float(values.pop("lr"))
    try:
        others = _settings(*values.values())
    except TypeError:  # cannot be hashed, as betas that are a list
        return AdaRankGradConfig.model_construct(lr=lr, **values)
    return others.model_copy(update={"lr": lr})


@lru_cache(maxsize=64, typed=True)
def _settings(*values: Any) -> AdaRankGradConfig:
    """The settings of these values in the order of SETTINGS, without the learning rate."""
    keys = (key for key in SETTINGS if key != "lr")
    return AdaRankGradConfig.model_construct(**dict(zip(keys, values, strict=True)))


def settings_text(settings: AdaRankGradConfig) -> str:
    """The settings as text, by which processes compare them."""
    return "; ".join(f"{key}={value!r}" for key, value in settings)


def group_spec(
    group: ParameterGroup, settings: AdaRankGradConfig, full_rank: frozenset[str]
) -> GroupSpec:
    """Specify one group for the layout: its fragments, and which of them contain matrices.

    Args:
        group: the group's tensors and names.
        settings: the group's settings.
        full_rank: names of parameters trained by full-rank Adam whatever their shape.
    """

    def views(name: str, shape: tuple[int, ...]) -> list[MatrixView]:
        return [] if name in full_rank else trained_views(name, shape, settings)

    holding = hold(group)
    _check_trainable(holding)
    return GroupSpec(
        holding=holding,
        side=settings.side,
        shard_basis=settings.shard_basis,
        views=views,
        settings=settings_text(settings),
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
