"""``accelerator.prepare``: every AdaRankGrad that it gets is checked, also without arg_dist's own.

accelerate replaces, drops or reloads optimizers silently; these are noticed before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from arg_dist.config import ConfigError
from arg_dist.engines.deepspeed_guard import introduce
from arg_dist.engines.patching import wrap_method
from arg_dist.engines.replicated import sketch_only
from arg_dist.integrations.accelerate import check_accelerator, check_optimizer, innermost
from arg_dist.library_internals import (
    ACCELERATOR,
    CLIP_NORM,
    CLIP_VALUE,
    PREPARE,
    PREPARE_OPTIMIZER,
    PREPARED_OPTIMIZER,
    PREPARED_OPTIMIZER_BUILT,
    PREPARED_OPTIMIZERS,
)
from arg_dist.optimizer import AdaRankGrad

_PREPARING: ContextVar[bool] = ContextVar("preparing", default=False)
"""Whether ``accelerator.prepare`` is running, which calls the methods for single objects."""


def check_what_is_prepared() -> None:
    """Makes accelerate check each AdaRankGrad that it prepares; idempotent."""
    accelerator, wrapper = ACCELERATOR.if_imported(), PREPARED_OPTIMIZER.if_imported()
    if accelerator is not None and wrapper is not None:
        wrap_method(accelerator, PREPARE, _prepare)
        wrap_method(accelerator, PREPARE_OPTIMIZER, _prepare_optimizer)
        for method in (CLIP_NORM, CLIP_VALUE):
            wrap_method(accelerator, method, partial(_clip, method.name))
        wrap_method(wrapper, PREPARED_OPTIMIZER_BUILT, _wrap)


def _prepare(prepare: Callable[..., Any], accelerator: Any, *given: Any, **more: Any) -> Any:
    ours = {i: inner for i, each in enumerate(given) if (inner := _adarankgrad(each)) is not None}
    if ours:
        check_accelerator(accelerator)
        if accelerator.distributed_type.value == "DEEPSPEED":
            _check_together(accelerator, given)
            for optimizer in ours.values():  # it may have been built before this was imported
                introduce(type(optimizer))
    before = _PREPARING.set(True)
    try:
        prepared = prepare(accelerator, *given, **more)
    finally:
        _PREPARING.reset(before)
    results = prepared if len(given) > 1 else (prepared,)
    for i, optimizer in ours.items():
        if check_optimizer(results[i]) is not optimizer:
            raise ConfigError(f"prepare: another AdaRankGrad took the place of argument {i}")
    if any(sends_sketches(optimizer) for optimizer in ours.values()):
        for result in results:
            if isinstance(result, DistributedDataParallel):
                sketch_only(result)
    return prepared


def _prepare_optimizer(
    prepare: Callable[..., Any], accelerator: Any, optimizer: Any, *args: Any, **more: Any
) -> Any:
    ours = _adarankgrad(optimizer)
    if ours is not None and not _PREPARING.get():
        check_accelerator(accelerator)
        kind = accelerator.distributed_type.value
        targets = [p for group in ours.param_groups for p in group["params"]]
        plain = not any(hasattr(target, "placements") for target in targets)
        if kind == "DEEPSPEED" or (kind == "FSDP" and plain):
            raise ConfigError(
                f"prepare_optimizer: got an AdaRankGrad without its model, under {kind}, which "
                "replaces the parameters: pass both to one accelerator.prepare(model, optimizer)"
            )
    return prepare(accelerator, optimizer, *args, **more)


def _wrap(
    init: Callable[..., None],
    wrapper: Any,
    optimizer: Any,
    device_placement: bool = True,
    scaler: Any = None,
) -> None:
    """Leaves the state of an optimizer that has trained where it is.

    accelerate would load ``state_dict()`` back, which each process has a part of.
    """
    trained = isinstance(optimizer, AdaRankGrad) and any(True for _ in optimizer.every_plan())
    init(wrapper, optimizer, device_placement and not trained, scaler)
    wrapper.device_placement = device_placement


def _clip(by: str, clip: Callable[..., Any], accelerator: Any, *given: Any, **more: Any) -> Any:
    """Refuses to clip a process's own gradient, which is not that of the model."""
    check_clipping(PREPARED_OPTIMIZERS.of(accelerator), f"accelerator.{by}")
    return clip(accelerator, *given, **more)


def check_clipping(optimizers: Iterable[Any], by: str) -> None:
    """Refuses to clip gradients that are not averaged.

    Args:
        optimizers: those that train, in whatever wrappers.
        by: what would clip.

    Raises:
        ConfigError: one of them is an AdaRankGrad with ``gradient_sync="sketch"``.
    """
    ours = [_adarankgrad(each) for each in optimizers]
    if any(each is not None and sends_sketches(each) for each in ours):
        raise ConfigError(
            f"{by}: would clip each process's own gradient by another factor, as gradient_sync=\""
            'sketch" does not average them; remove it (for the Trainer max_grad_norm=0), and '
            "pass max_grad_norm to AdaRankGrad, which clips by the norm of their mean"
        )


def sends_sketches(optimizer: AdaRankGrad) -> bool:
    """Whether it averages sketches, and expects gradients that are not averaged."""
    return bool(optimizer.defaults["gradient_sync"] == "sketch")


def _adarankgrad(given: Any) -> AdaRankGrad | None:
    """Returns the AdaRankGrad in an optimizer; None in anything else."""
    inner = innermost(given) if isinstance(given, Optimizer) else None
    return inner if isinstance(inner, AdaRankGrad) else None


def _check_together(accelerator: Any, given: tuple[Any, ...]) -> None:
    """Refuses what accelerate would not pass on to DeepSpeed.

    Raises:
        ConfigError: the model is missing, there are several optimizers, or this accelerator has an
            engine, which alone it would step.
    """
    optimizers = sum(isinstance(each, Optimizer) for each in given)
    if not any(isinstance(each, nn.Module) for each in given):
        raise ConfigError(
            "prepare: got an AdaRankGrad without its model; under DeepSpeed pass both to one "
            "accelerator.prepare(model, optimizer)"
        )
    if optimizers > 1:
        raise ConfigError(
            f"prepare: got {optimizers} optimizers in one call, of which accelerate passes only "
            "the last to DeepSpeed; use one optimizer with several parameter groups, or one "
            "Accelerator for each model and its optimizer"
        )
    if getattr(accelerator, "deepspeed_engine_wrapped", None) is not None:
        raise ConfigError(
            "prepare: this accelerator has a DeepSpeed engine from an earlier call, and would step "
            "only that one; use one Accelerator for each model and its optimizer"
        )
