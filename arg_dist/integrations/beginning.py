"""Checks of every training by ``transformers.Trainer`` with AdaRankGrad, when it begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from arg_dist.config import ConfigError
from arg_dist.engines.patching import wrap_method
from arg_dist.integrations.preparing import check_clipping
from arg_dist.integrations.saving import consolidate_before_saving, optimizers_in
from arg_dist.integrations.trainer import check_processes, from_arguments
from arg_dist.library_internals import (
    CALLBACK_HANDLER,
    SAVE_OPTIMIZER,
    TRAINER,
    TRAINING_BEGINS,
    TRANSFORMERS,
)
from arg_dist.optimizer import AdaRankGrad


def check_trainings() -> None:
    """Makes the Trainer check each training with AdaRankGrad before its first step; idempotent."""
    handler = CALLBACK_HANDLER.if_imported()
    if handler is not None:
        wrap_method(handler, TRAINING_BEGINS, _begin)


def _begin(begin: Callable[..., Any], handler: Any, args: Any, *more: Any, **others: Any) -> Any:
    ours = optimizers_in(handler.optimizer)
    if ours:
        check_training(args, handler.model, ours)
    return begin(handler, args, *more, **others)


def check_training(args: Any, model: nn.Module | None, optimizers: list[AdaRankGrad]) -> None:
    """Refuses a training that would not be what its arguments say, or could not be saved.

    Args:
        args: the ``TrainingArguments``.
        model: the Trainer's model.
        optimizers: every AdaRankGrad in the Trainer's optimizer.

    Raises:
        ConfigError: processes would train separately, the model's parameters are not the
            optimizer's, the arguments have changed since the DeepSpeed JSON took them over, or
            each process would clip its own gradient.
        RuntimeError: this version of transformers saves in another way than the tested one.
    """
    check_processes(args)
    _check_parameters(model, optimizers)
    _check_json(args)
    check_own_clipping(args, optimizers)
    consolidate_before_saving()
    trainer = TRAINER.if_imported()
    if trainer is not None and not SAVE_OPTIMIZER.is_on(trainer):
        raise RuntimeError(
            f"transformers: Trainer has no {SAVE_OPTIMIZER.name} in the installed version, so its "
            f"checkpoints would lack the optimizer's state (tested: {TRANSFORMERS.tested}); "
            "install that version"
        )


def check_own_clipping(args: Any, optimizers: list[AdaRankGrad]) -> None:
    """Refuses arguments by which each process would clip its own gradient.

    Raises:
        ConfigError: they do, and gradients are not averaged.
    """
    if args.max_grad_norm:
        check_clipping(optimizers, f"max_grad_norm={args.max_grad_norm} of the Trainer's arguments")


def _check_parameters(model: nn.Module | None, optimizers: list[AdaRankGrad]) -> None:
    """Refuses an optimizer of other parameters than the model's.

    FSDP2 replaces the parameters of both.
    """
    trained = [p for p in model.parameters() if p.requires_grad] if model is not None else []
    if any(hasattr(parameter, "placements") for parameter in trained):
        return
    known = {identity for optimizer in optimizers for identity in optimizer.parameter_names()}
    if trained and not any(id(parameter) in known for parameter in trained):
        raise ConfigError(
            "optimizer: none of the model's parameters that train are in the AdaRankGrad passed to "
            "the Trainer: the model was changed after the optimizer was built, as by peft_config "
            "of TRL. Do not pass `optimizers=`; after creating the trainer, set "
            "trainer.optimizer_cls_and_kwargs = arg_dist.for_trainer(trainer.args)"
        )


def _check_json(args: Any) -> None:
    """Refuses arguments that differ from what ``"auto"`` became in the DeepSpeed JSON."""
    plugin = getattr(args, "deepspeed_plugin", None)
    section = plugin.deepspeed_config.get("optimizer") if plugin is not None else None
    if not section or section.get("type") != "AdaRankGrad":
        return
    for key, now in from_arguments(args).items():
        taken = section.get("params", {}).get(key)
        taken = tuple(taken) if isinstance(taken, list) else taken
        if taken not in (None, "auto", now):
            raise ConfigError(
                f"optimizer.params.{key}: the DeepSpeed JSON has {taken!r}, the Trainer's "
                f"arguments now say {now!r}: the Trainer fills in the JSON when it is created; "
                "change its arguments before, or remove the JSON's optimizer section and pass "
                "optimizer_cls_and_kwargs=arg_dist.for_trainer(args)"
            )
