"""Saving by accelerate and the Trainer, which write the optimizer's state on one process.

Under DDP the state is sharded, so it is gathered before either of them saves: for every AdaRankGrad
that they have, however they got it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch.optim import Optimizer

from arg_dist.engines.library_hooks import LIBRARIES, overriding, wrap_method
from arg_dist.optimizer import AdaRankGrad

TRAINER_SAVES = ("_save_optimizer_and_scheduler", "_tune_save_checkpoint")
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
    trainer: Any = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    for name in TRAINER_SAVES if trainer is not None else ():
        for owner in overriding(trainer, name) if hasattr(trainer, name) else ():
            wrap_method(owner, name, _save_by_trainer, library="transformers", tested="5.23.0")
    accelerator: Any = getattr(sys.modules.get("accelerate.accelerator"), "Accelerator", None)
    for owner in () if accelerator is None else overriding(accelerator, "save_state"):
        wrap_method(owner, "save_state", _save_state, library="accelerate", tested="1.15.0")


def _save_by_trainer(save: Callable[..., Any], trainer: Any, *args: Any, **more: Any) -> Any:
    if not trainer.is_deepspeed_enabled:  # its engine saves, and gathers
        consolidate(trainer.optimizer)
    return save(trainer, *args, **more)


def _save_state(save: Callable[..., Any], accelerator: Any, *args: Any, **more: Any) -> Any:
    engines = accelerator.distributed_type.value == "DEEPSPEED"
    consolidate(*(() if engines else accelerator._optimizers), *accelerator._custom_objects)
    return save(accelerator, *args, **more)


LIBRARIES.append(consolidate_before_saving)
