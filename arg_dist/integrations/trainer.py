"""``transformers.Trainer``: build AdaRankGrad through ``optimizer_cls_and_kwargs``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Unpack

import torch.distributed as dist
from torch import nn

from arg_dist.config import ConfigError, parse_config
from arg_dist.engines.patching import wrap_method
from arg_dist.library_internals import CREATE_OPTIMIZER
from arg_dist.model_groups import param_groups
from arg_dist.optimizer import AdaRankGrad
from arg_dist.settings import GroupSettings, JobSettings

_TRAINER: ContextVar[Any] = ContextVar("trainer", default=None)
"""The Trainer that is building its optimizer."""


class TrainerSettings(GroupSettings, JobSettings):
    """Settings of :func:`for_trainer` other than the patterns, which are named there."""


class OptimizerFactory:
    """Builds the optimizer from the Trainer's model, with parameter names and weight decay groups.

    The Trainer calls ``OptimizerFactory()(model, **settings)`` if the class is not an optimizer;
    axolotl's passes its arguments, too. That of transformers 4 calls ``OptimizerFactory(groups,
    **settings)``, where the groups have no names: the model is taken from the Trainer instead.
    """

    def __new__(cls, groups: Any = None, /, **settings: Any) -> Any:
        """A factory; with the parameter groups of transformers 4, the optimizer."""
        factory = super().__new__(cls)
        return factory if groups is None else factory(_TRAINER.get().model, **settings)

    def __call__(
        self, model: nn.Module, trainer_args: Any = None, /, *, args: Any, **settings: Any
    ) -> AdaRankGrad:
        """Builds the optimizer of `model`, without weight decay for norms and biases.

        Args:
            model: the Trainer's model.
            trainer_args: the Trainer's arguments, if it passes them.
            args: the arguments that :func:`for_trainer` received; those of the Trainer, which may
                be others, go first. They are read now: a search changes them for each trial.
            **settings: what :func:`for_trainer` received; goes before `args`.

        Raises:
            ConfigError: a setting is out of range, or the processes would train separately.
        """
        args = trainer_args or getattr(_TRAINER.get(), "args", args)
        check_processes(args)
        chosen = {key: settings.pop(key) for key in CHOICES if key in settings}
        before, now = settings.pop("as_given", {}), from_arguments(args)
        for key in settings.keys() & before.keys():
            if before[key] != now[key]:
                warnings.warn(
                    f"for_trainer: {key}={settings[key]!r} was passed to it, so the arguments' "
                    f"change from {before[key]!r} to {now[key]!r} has no effect",
                    stacklevel=2,
                )
        given = {**now, **settings}
        parse_config(given, "for_trainer")
        return AdaRankGrad(param_groups(model, decay_vectors=False, **chosen), **given)


CHOICES = ("targets", "exclude", "convolutions")
"""Arguments of :func:`arg_dist.param_groups`."""


def for_trainer(
    args: Any,
    *,
    targets: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    convolutions: bool = False,
    **settings: Unpack[TrainerSettings],
) -> tuple[type[OptimizerFactory], dict[str, Any]]:
    """Returns the ``optimizer_cls_and_kwargs`` with which the Trainer trains with AdaRankGrad.

    ``Trainer(model, args, optimizer_cls_and_kwargs=arg_dist.for_trainer(args, max_rank=0.25))``

    For a trainer without this parameter (DPO, GRPO, KTO and RLOO of TRL), under any engine:
    ``trainer.optimizer_cls_and_kwargs = arg_dist.for_trainer(trainer.args)``.

    Args:
        args: the ``TrainingArguments``, which provide learning rate, betas, epsilon and weight
            decay unless `settings` does; they are read whenever the Trainer builds an optimizer.
        targets: see :func:`arg_dist.param_groups`.
        exclude: see :func:`arg_dist.param_groups`.
        convolutions: see :func:`arg_dist.param_groups`.
        **settings: fields of :class:`arg_dist.AdaRankGradConfig`.

    Raises:
        ConfigError: a setting is unknown or out of range, or the DeepSpeed JSON also names an
            optimizer, which the Trainer would prefer, or the processes would train separately.
    """
    check_processes(args)
    # from the arguments, or from the settings of accelerate's launcher
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None and "optimizer" in plugin.deepspeed_config:
        raise ConfigError(
            "optimizer: the DeepSpeed JSON has this section, from which the Trainer would build "
            "the optimizer instead of this one; remove the section, or move AdaRankGrad's "
            "settings into it and do not pass optimizer_cls_and_kwargs"
        )
    parse_config(settings, "for_trainer")
    _follow_arguments()
    chosen = {"targets": targets, "exclude": exclude, "convolutions": convolutions}
    return OptimizerFactory, {
        "args": args,
        "as_given": from_arguments(args),
        **settings,
        **chosen,
    }


def from_arguments(args: Any) -> dict[str, Any]:
    """Returns the optimizer's settings that ``TrainingArguments`` have, as they are now."""
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }


def _follow_arguments() -> None:
    """Makes the factory see the Trainer that calls it; idempotent.

    A trainer may replace the arguments that it was given, as TRL's do with TrainingArguments.
    """
    from transformers import Trainer

    wrap_method(Trainer, CREATE_OPTIMIZER, _create_with_arguments)


def _create_with_arguments(
    create: Callable[..., Any], trainer: Any, *args: Any, **more: Any
) -> Any:
    before = _TRAINER.set(trainer)
    try:
        return create(trainer, *args, **more)
    finally:
        _TRAINER.reset(before)


def check_processes(args: Any) -> None:
    """Refuses processes that would train separately, each on all of the data.

    Args:
        args: the ``TrainingArguments``.

    Raises:
        ConfigError: the Trainer counts fewer processes than were started.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if dist.is_initialized():
        started = dist.get_world_size()
    if args.world_size != started:
        raise ConfigError(
            f"the Trainer counts {args.world_size} process(es) where {started} were started, so "
            "each of them would train on all of the data. accelerate detects DeepSpeed only on "
            "GPUs and similar devices; on CPUs, before creating the TrainingArguments, set the "
            "environment variable ACCELERATE_USE_DEEPSPEED=true and call "
            'accelerate.PartialState(backend="gloo"), and pass them '
            'accelerator_config={"use_configured_state": True}'
        )
