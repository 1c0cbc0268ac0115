"""Saving by accelerate and the Trainer, which write the optimizer's state on one process.

Under DDP the state is sharded, so it is gathered before either of them saves: for every AdaRankGrad
that they have, however they got it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.optim import Optimizer

from arg_dist.engines.patching import overriding, wrap_method
from arg_dist.library_internals import (
    ACCELERATOR,
    PREPARED_OPTIMIZERS,
    REGISTERED_OBJECTS,
    SAVE_OPTIMIZER,
    SAVE_STATE,
    SAVE_TRIAL,
    TRAINER,
)
from arg_dist.optimizer import AdaRankGrad

TRAINER_SAVES = (SAVE_OPTIMIZER, SAVE_TRIAL)
"""Methods in which the Trainer calls ``state_dict`` on its first process."""


def optimizers_in(*holders: Any) -> list[AdaRankGrad]:
    """Returns every AdaRankGrad in objects that are, wrap or hold optimizers, each once."""
    seen: set[int] = set()
    return [each for holder in holders for each in _search(holder, seen)]


def _search(holder: Any, seen: set[int]) -> Iterator[AdaRankGrad]:
    if id(holder) in seen:
        return
    seen.add(id(holder))
    if isinstance(holder, AdaRankGrad):
        yield holder
        return
    for name, value in getattr(holder, "__dict__", {}).items():
        several = value.values() if isinstance(value, dict) else value
        for each in several if isinstance(value, (dict, list, tuple)) else (value,):
            # wrappers of optimizers need not be optimizers themselves
            if isinstance(each, Optimizer) or name == "optimizer":
                yield from _search(each, seen)


def consolidate(*holders: Any) -> None:
    """Gathers the state of every AdaRankGrad in `holders` on the first process; a collective."""
    for optimizer in optimizers_in(*holders):
        try:
            optimizer.consolidate_state_dict()
        except RuntimeError as error:
            error.add_note(
                "save_state and the Trainer gather sharded state here: call them on every process"
            )
            raise


def consolidate_before_saving() -> None:
    """Makes accelerate and the Trainer gather sharded state before they save it; idempotent.

    Only those that have been imported.
    """
    trainer = TRAINER.if_imported()
    for save in TRAINER_SAVES if trainer is not None else ():
        for owner in overriding(trainer, save) if save.is_on(trainer) else ():
            wrap_method(owner, save, _save_by_trainer)
    accelerator = ACCELERATOR.if_imported()
    for owner in () if accelerator is None else overriding(accelerator, SAVE_STATE):
        wrap_method(owner, SAVE_STATE, _save_state)


def _save_by_trainer(save: Callable[..., Any], trainer: Any, *args: Any, **more: Any) -> Any:
    if not trainer.is_deepspeed_enabled:  # its engine saves, and gathers
        consolidate(trainer.optimizer)
    return save(trainer, *args, **more)


def _save_state(save: Callable[..., Any], accelerator: Any, *args: Any, **more: Any) -> Any:
    engines = accelerator.distributed_type.value == "DEEPSPEED"
    prepared = () if engines else PREPARED_OPTIMIZERS.of(accelerator)
    consolidate(*prepared, *REGISTERED_OBJECTS.of(accelerator))
    return save(accelerator, *args, **more)
