"""A model's parameters by name and shape, built on the ``meta`` device without weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from arg_dist.config import AdaRankGradConfig, ConfigError
from arg_dist.model_groups import param_groups
from arg_dist.parameter_groups import trained_views
from arg_dist.planning.choices import VOCABULARY
from arg_dist.planning.llama import LLAMA_PLAN, LLAMA_SIZES, model_config, skeleton
from arg_dist.sharding.layout import MatrixView


@dataclass(frozen=True)
class Parameter:
    """One trained parameter.

    Attributes:
        name: name in the model.
        shape: its shape.
        views: the low-rank matrices in it; empty if full-rank Adam trains it.
    """

    name: str
    shape: tuple[int, ...]
    views: tuple[MatrixView, ...]

    @cached_property
    def numel(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Model:
    """The description of a model that a plan is computed from.

    Attributes:
        name: name or path as given by the user.
        parameters: parameters in the model's order.
        by_group: the same parameters in the order of :func:`arg_dist.param_groups`.
        tp_plan: how tensor parallelism cuts modules and parameters, in the styles of transformers,
            by names with ``*`` for numbers; empty if it is not known.
    """

    name: str
    parameters: tuple[Parameter, ...]
    by_group: tuple[Parameter, ...]
    tp_plan: Mapping[str, str] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """Elements of all parameters."""
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(parameter.numel for parameter in self.parameters)


def load_model(name: str, settings: AdaRankGradConfig, *, vocab_size: int | None = None) -> Model:
    """Load the parameters of a size in ``LLAMA_SIZES``, or of the configuration at a path.

    Args:
        name: a size, a Hugging Face directory, or its ``config.json``; no weights are read.
        settings: the optimizer's settings, which decide what is low-rank.
        vocab_size: vocabulary of a named size; default: :data:`VOCABULARY`.

    Raises:
        ConfigError: the model was not found, or is not a causal language model of transformers.
        ConfigError: `targets` or `exclude` has a pattern that matches nothing.
    """
    model = _built(name, vocab_size)
    groups = param_groups(model, targets=settings.targets, exclude=settings.exclude)
    low_rank = {
        name: group.get("low_rank", True) for group in groups for name in group["param_names"]
    }
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = describe(shapes, settings, low_rank)
    order = {name: i for i, name in enumerate(low_rank)}
    by_group = tuple(sorted(found, key=lambda p: order[p.name]))
    tp_plan = LLAMA_PLAN if name in LLAMA_SIZES else getattr(model, "tp_plan", None)
    return Model(name, found, by_group, tp_plan or {})


def _built(name: str, vocab_size: int | None) -> nn.Module:
    """The model on the ``meta`` device; only a path requires transformers."""
    if size := LLAMA_SIZES.get(name):
        return skeleton(size, vocab_size or VOCABULARY)
    if vocab_size is not None:
        raise ConfigError(
            f"--vocab-size {vocab_size}: --model {name} has a vocabulary of its own; use it only "
            f"with {', '.join(LLAMA_SIZES)}"
        )
    config = model_config(name, vocab_size=0, length=1)
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
            model.tie_weights()  # type: ignore[operator]  # transformers 5.0 does not
    except ValueError as error:
        raise ConfigError(f"--model {name}: {str(error).splitlines()[0]}") from None
    return model


def describe(
    shapes: Mapping[str, tuple[int, ...]],
    settings: AdaRankGradConfig,
    low_rank: Mapping[str, bool] | None = None,
) -> tuple[Parameter, ...]:
    """Parameters of the given shapes, by name; those with `low_rank` False are left to Adam."""
    return tuple(
        Parameter(name, shape, views_of(name, shape, settings, (low_rank or {}).get(name, True)))
        for name, shape in shapes.items()
    )


def views_of(
    name: str, shape: tuple[int, ...], settings: AdaRankGradConfig, low_rank: bool
) -> tuple[MatrixView, ...]:
    """The low-rank matrices in a parameter; empty if Adam trains it."""
    return tuple(trained_views(name, shape, settings)) if low_rank else ()


def matrix_names(parameters: Iterable[Parameter]) -> list[str]:
    """Names of all low-rank matrices."""
    return [view.name for parameter in parameters for view in parameter.views]
