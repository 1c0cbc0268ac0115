"""The guard that DeepSpeed calls after receiving an optimizer and before wrapping it.

It refuses unsupported settings, passes the model's parameter names to the optimizer, and detects an
optimizer that has replaced AdaRankGrad.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from arg_dist.config import ConfigError
from arg_dist.engines.deepspeed_checkpoints import follow_checkpoints
from arg_dist.engines.deepspeed_config import refuse_unsupported
from arg_dist.engines.patching import is_wrapped, wrap_method
from arg_dist.engines.replicated import changed_weights, same_values
from arg_dist.library_internals import (
    ACCEPTED_OPTIMIZERS,
    CONFIG_VALUES,
    DEEPSPEED_ENGINE,
    ENGINE_CONFIG,
    OPTIMIZER_CHECK,
)
from arg_dist.model_groups import named_parameters, uses
from arg_dist.optimizer import AdaRankGrad
from arg_dist.uses import Use

MOE = (
    "model: got DeepSpeed MoE layers, whose experts are reduced over separate process groups; "
    "AdaRankGrad does not support these groups; use a model without deepspeed.moe layers, or AdamW"
)

_EXPECTED: set[str] = set()
"""A token for each AdaRankGrad that has been built but has not stepped yet."""

_TOKENS: weakref.WeakKeyDictionary[AdaRankGrad, str] = weakref.WeakKeyDictionary()
"""The token of each of them that still exists."""

_TOKEN = "_token_of_adarankgrad"
"""Attribute of its parameters with this token.

No weak reference: ``torch.utils.swap_tensors``, which moves some modules, refuses tensors with
them. Nor ``id``, which another tensor may have later.
"""

_ENGINES: weakref.WeakKeyDictionary[AdaRankGrad, weakref.ref[Any]] = weakref.WeakKeyDictionary()
"""The DeepSpeed engine of each optimizer."""


def wrapper_of(optimizer: AdaRankGrad) -> Any:
    """Returns DeepSpeed's wrapper of an optimizer; None if DeepSpeed does not use it."""
    engine = _ENGINES[optimizer]() if optimizer in _ENGINES else None
    return None if engine is None else engine.optimizer


def expect(optimizer: AdaRankGrad) -> None:
    """Records the parameters for which an optimizer was built, until its first step.

    The optimizer may no longer exist when another one is passed to DeepSpeed for these parameters.
    """
    token = uuid.uuid4().hex
    _EXPECTED.add(token)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            setattr(parameter, _TOKEN, token)
    _TOKENS[optimizer] = token


def has_stepped(optimizer: AdaRankGrad) -> None:
    """Records that an optimizer takes its first step, and is not expected any longer."""
    _EXPECTED.discard(_TOKENS.pop(optimizer, ""))


def _is_expected(parameter: Any) -> bool:
    """Whether an AdaRankGrad was built for a parameter and has not stepped."""
    return getattr(parameter, _TOKEN, None) in _EXPECTED


def introduce(optimizer_class: type) -> None:
    """Makes DeepSpeed accept the optimizer class and call the guard; idempotent.

    Raises:
        RuntimeError: this version of DeepSpeed does not have the method that the guard wraps.
    """
    accepted = ACCEPTED_OPTIMIZERS.imported()
    if optimizer_class not in accepted:
        accepted.append(optimizer_class)
    wrap_method(DEEPSPEED_ENGINE.imported(), OPTIMIZER_CHECK, _guard)


def refuse_unguarded() -> None:
    """Refuses an optimizer that DeepSpeed received before the guard was introduced.

    Raises:
        RuntimeError: DeepSpeed is in use, and was imported after every optimizer had been built.
    """
    engine = DEEPSPEED_ENGINE.if_imported()
    if engine is None or is_wrapped(engine, OPTIMIZER_CHECK):
        return
    import deepspeed

    if deepspeed.comm.is_initialized():
        raise RuntimeError(
            "DeepSpeed was imported after the AdaRankGrad was built, so its settings are unchecked "
            "and its checkpoints would be incomplete; import deepspeed before building the "
            "optimizer, or use arg_dist.initialize"
        )


def _guard(check: Callable[..., Any], engine: Any, basic_optimizer: Any) -> Any:
    if isinstance(basic_optimizer, AdaRankGrad):
        config = CONFIG_VALUES.of(ENGINE_CONFIG.of(engine))
        refuse_unsupported(config, cuda=torch.cuda.is_available())
        _refuse_model(engine)
        name_parameters(basic_optimizer, engine.module)
        _ENGINES[basic_optimizer] = weakref.ref(engine)
        follow_checkpoints(engine, basic_optimizer)
        if not engine.zero_optimization():
            _check_copies(basic_optimizer)
    else:
        _refuse_replacement(engine, basic_optimizer)
    return check(engine, basic_optimizer)


def _check_copies(optimizer: AdaRankGrad) -> None:
    """Checks once, at the first step after initialization, that stage 0's fp32 copies are current.

    DeepSpeed takes a step of zeros while it makes the copies, so that the optimizer is bound, and
    has compared them, before the weights could change.
    """
    is_checked = False

    def check(*_: Any) -> None:
        nonlocal is_checked
        wrapper = wrapper_of(optimizer)
        if is_checked or not hasattr(wrapper, "fp32_groups"):
            return
        names = optimizer.parameter_names()
        for copies, originals in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for copy, original in zip(copies, originals, strict=True):
                if not same_values(copy, original):
                    raise RuntimeError(changed_weights(names.get(id(original), "a parameter")))
        is_checked = True

    optimizer.register_step_pre_hook(check)


def name_parameters(optimizer: AdaRankGrad, model: nn.Module) -> None:
    """Names bare parameters as in `model`, and keeps embeddings and output heads full-rank.

    If the optimizer's groups already specify which matrices are low-rank, they are unchanged.

    Raises:
        ConfigError: a pattern of ``targets`` or ``exclude`` matches nothing, or is given although
            the groups already specify which matrices are low-rank.
    """
    patterns = {key: optimizer.defaults[key] for key in ("targets", "exclude")}
    if optimizer.is_classified and any(patterns.values()):
        raise ConfigError(
            "targets, exclude: the parameter groups already specify which matrices are low-rank; "
            "pass the patterns to arg_dist.param_groups instead"
        )
    names = {id(parameter): name for name, parameter in named_parameters(model)}
    renamed = {
        old: names[identity]
        for identity, old in optimizer.parameter_names().items()
        if identity in names
    }
    full_rank: list[str] = []
    found: dict[str, Use] = {}
    if not optimizer.is_classified:
        found = uses(model, **patterns)
        full_rank = [name for name, use in found.items() if use != "matrix"]
    optimizer.adopt_names(renamed, full_rank, found)


def _refuse_model(engine: Any) -> None:
    """Refuses what the configuration does not show: models that are themselves distributed."""
    if engine.has_moe_layers:
        raise ConfigError(MOE)
    if engine.pipeline_parallelism:
        raise ConfigError(
            "model: got a PipelineModule; AdaRankGrad does not support DeepSpeed's pipeline "
            "stages; use ZeRO stages 0-3 without them"
        )
    if engine.mp_world_size > 1:
        raise ConfigError(
            f"mpu: got {engine.mp_world_size} model-parallel processes; AdaRankGrad needs whole "
            "matrices within a data-parallel group; remove mpu"
        )

    for name, parameter in named_parameters(engine.module):
        if parameter.requires_grad and parameter.is_complex():
            raise ConfigError(
                f"{name}: got a parameter of type {parameter.dtype}; DeepSpeed does not average "
                "gradients of complex numbers, or drops their imaginary part; store it as pairs of "
                "reals (torch.view_as_real) and use torch.view_as_complex in forward(), or train "
                "with DDP or FSDP2"
            )


def _refuse_replacement(engine: Any, trains: Any) -> None:
    """Refuses another optimizer for parameters for which an AdaRankGrad was built.

    Raises:
        ConfigError: another optimizer would train them; the message gives the likely cause.
    """
    parameters = named_parameters(engine.module)
    name = next((name for name, parameter in parameters if _is_expected(parameter)), None)
    if name is None:
        return
    kind = type(trains).__name__
    if kind.startswith("DeepSpeedCPU"):
        cause = (
            "accelerate replaces every optimizer if the JSON has offload_optimizer; set "
            '"zero_force_ds_cpu_optimizer": false in it'
        )
    else:
        cause = (
            "it did not reach deepspeed.initialize: pass it there (optimizer=...), or name "
            "AdaRankGrad in the JSON's optimizer section. The Trainer drops optimizers=(...) under "
            "DeepSpeed; there use optimizer_cls_and_kwargs=arg_dist.for_trainer(args, ...) (where "
            "a trainer has no such parameter, as TRL's DPO, set its attribute of that name)"
        )
    raise ConfigError(
        f"optimizer: an AdaRankGrad was built for {name} and others, but {kind} would train them: "
        f"{cause}"
    )
