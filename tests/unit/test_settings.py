"""The types of the settings as keyword arguments are those of the model that validates them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, Unpack, get_args, get_origin, get_type_hints

import pytest
from pydantic import ByteSize
from torch import Tensor

import arg_dist
from arg_dist import AdaRankGradConfig
from arg_dist.config import PRESETS
from arg_dist.integrations.trainer import TrainerSettings
from arg_dist.parameter_groups import OF_ALL
from arg_dist.settings import AdamSettings, GroupSettings, Settings

FIELDS = AdaRankGradConfig.model_fields
TYPES = get_type_hints(Settings) | get_type_hints(TrainerSettings)


def accepted(annotation: Any) -> set[Any]:
    """The types and literals that an annotation consists of; tensors stand for their number."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return accepted(parts[0])
    if origin in (Union, UnionType):
        return set().union(*map(accepted, parts))
    if origin is Literal:
        return set(parts)
    if origin in (tuple, Sequence):
        of_any_length = origin is Sequence or parts[-1] is Ellipsis
        inner = [frozenset(accepted(part)) for part in parts if part is not Ellipsis]
        return {("each", inner[0]) if of_any_length else tuple(inner)}
    if annotation is ByteSize:
        return {int, float, str}
    return set() if annotation is Tensor else {annotation}


def test_every_setting_has_a_type_and_every_type_is_a_settings():
    assert TYPES.keys() == FIELDS.keys()


@pytest.mark.parametrize("name", FIELDS)
def test_a_settings_type_is_that_of_its_field(name):
    assert accepted(TYPES[name]) == accepted(FIELDS[name].annotation)


@pytest.mark.parametrize("preset", [{}, *PRESETS.values()])
def test_defaults_are_of_the_types(preset):
    for name, value in AdaRankGradConfig(**preset):
        allowed = accepted(TYPES[name])
        if isinstance(value, tuple):
            assert tuple(frozenset({type(each)}) for each in value) in allowed, name
        else:
            assert value in allowed or type(value) in allowed, name


@pytest.mark.parametrize(
    ("door", "types", "named"),
    [
        (arg_dist.AdaRankGrad.__init__, Settings, AdamSettings.__annotations__.keys()),
        (arg_dist.param_groups, GroupSettings, set()),
        (arg_dist.for_trainer, TrainerSettings, {"targets", "exclude"}),
    ],
)
def test_every_door_knows_its_settings(door: Callable[..., Any], types: type, named: set[str]):
    hints = get_type_hints(door)
    assert hints["settings"] == Unpack[types]
    assert named <= hints.keys() and named.isdisjoint(types.__annotations__)
    for name in named:
        assert accepted(hints[name]) == accepted(TYPES[name])
    everything = types.__annotations__.keys() | named
    assert everything == FIELDS.keys() - (OF_ALL if types is GroupSettings else set())


def test_a_group_has_no_settings_of_the_whole_optimizer():
    assert OF_ALL | GroupSettings.__annotations__.keys() == FIELDS.keys()
    assert OF_ALL.isdisjoint(GroupSettings.__annotations__)
