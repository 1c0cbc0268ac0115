"""``transformers.Trainer``: build AdaRankGrad through ``optimizer_cls_and_kwargs``."""

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
    """Builds the optimizer from the Trainer's model, with parameter names and weight decay groups.

    The Trainer calls ``OptimizerFactory()(model, **settings)`` if the class is not an optimizer.
    """

    def __call__(self, model: nn.Module, **settings: Any) -> AdaRankGrad:
        """Builds the optimizer of `model`, without weight decay for norms and biases."""
        consolidate_before_saving()
        chosen = {key: settings.pop(key) for key in CHOICES if key in settings}
        groups = param_groups(model, decay_vectors=False, **chosen)
        return AdaRankGrad(groups, **settings)


def consolidate_before_saving() -> None:
    """Makes the Trainer consolidate sharded state before its first process saves it; idempotent.

    Raises:
        RuntimeError: this version of transformers does not have the method to be wrapped.
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
    """Returns the ``optimizer_cls_and_kwargs`` with which the Trainer trains with AdaRankGrad.

    ``Trainer(model, args, optimizer_cls_and_kwargs=arg_dist.for_trainer(args, max_rank=0.25))``

    Args:
        args: the ``TrainingArguments``, which provide learning rate, betas, epsilon and weight
            decay unless `settings` does.
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
