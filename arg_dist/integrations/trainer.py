"""The line that a user of ``transformers.Trainer`` writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from arg_dist.config import ConfigError, parse_config
from arg_dist.engines.library_hooks import wrap_method
from arg_dist.groups import param_groups
from arg_dist.integrations.accelerate import innermost
from arg_dist.optimizer import AdaRankGrad


class OptimizerFactory:
    """Builds the optimizer once the Trainer has its model: with names, and with its weight decay.

    The Trainer calls ``OptimizerFactory()(model, **settings)`` for a class that is no optimizer.
    """

    def __call__(self, model: nn.Module, **settings: Any) -> AdaRankGrad:
        """The optimizer of `model`; norms and biases are not decayed, as is the Trainer's way."""
        consolidate_before_saving()
        chosen = {key: settings.pop(key) for key in CHOICES if key in settings}
        groups = param_groups(model, decay_vectors=False, **chosen)
        return AdaRankGrad(groups, **settings)


def consolidate_before_saving() -> None:
    """Lets the Trainer put sharded state together before its first process alone saves it; once.

    Raises:
        RuntimeError: this version of transformers has no place for it.
    """
    from transformers import Trainer

    wrap_method(
        Trainer,
        "_save_optimizer_and_scheduler",
        _consolidate_and_save,
        library="transformers",
        tested="5.23.0",
    )


def _consolidate_and_save(save: Callable[..., None], trainer: Any, output_dir: str) -> None:
    optimizer = innermost(trainer.optimizer)
    if isinstance(optimizer, AdaRankGrad):
        optimizer.consolidate_state_dict()
    save(trainer, output_dir)


CHOICES = ("targets", "exclude", "convolutions")
"""Arguments of :func:`arg_dist.param_groups`."""


def for_trainer(
    args: Any,
    *,
    targets: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    convolutions: bool = False,
    **settings: Any,
) -> tuple[type[OptimizerFactory], dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` needs to train with AdaRankGrad.

    ``Trainer(model, args, optimizer_cls_and_kwargs=arg_dist.for_trainer(args, max_rank=0.25))``

    Args:
        args: the ``TrainingArguments``: learning rate, betas, epsilon and weight decay are theirs
            where `settings` has none.
        targets: see :func:`arg_dist.param_groups`.
        exclude: see :func:`arg_dist.param_groups`.
        convolutions: see :func:`arg_dist.param_groups`.
        **settings: fields of :class:`arg_dist.AdaRankGradConfig`.

    Raises:
        ConfigError: a setting is unknown or out of range, or the DeepSpeed JSON names an optimizer
            too, which the Trainer would prefer, or the processes do not know of each other.
    """
    check_processes(args)
    # made from the arguments, or from what accelerate's launcher was told
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None and "optimizer" in plugin.deepspeed_config:
        raise ConfigError(
            "optimizer: the DeepSpeed JSON has this section, and the Trainer would build the "
            "optimizer from it and drop this one; remove the section, or put AdaRankGrad's "
            "settings into it and leave optimizer_cls_and_kwargs out"
        )
    given = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        **settings,
    }
    parse_config(given, "for_trainer")
    chosen = {"targets": targets, "exclude": exclude, "convolutions": convolutions}
    return OptimizerFactory, {**given, **chosen}


def check_processes(args: Any) -> None:
    """Refuses processes that do not know of each other: each would train on all of the data.

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
            "each of them would train on all of the data. accelerate knows DeepSpeed on GPUs and "
            "their like only; on CPUs, before the TrainingArguments are made, set the environment "
            'variable ACCELERATE_USE_DEEPSPEED=true and call accelerate.PartialState(backend="gloo'
            '"), and give them accelerator_config={"use_configured_state": True}'
        )
