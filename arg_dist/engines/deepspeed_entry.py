"""The ways into DeepSpeed: by name from the JSON, by :func:`initialize`, or as a client optimizer.

All three pass the same guard, which DeepSpeed runs into after it has built or been given the
optimizer and before it wraps it: settings that cannot work are refused there, and the optimizer
learns the model's names.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from arg_dist.config import ConfigError, parse_config
from arg_dist.engines.deepspeed_config import (
    load_deepspeed_config,
    optimizer_settings,
    refuse_unsupported,
)
from arg_dist.groups import classify
from arg_dist.optimizer import AdaRankGrad


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Iterable[Any] | None = None,
    *positional: Any,
    config: str | Path | Mapping[str, Any] | None = None,
    **others: Any,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` for AdaRankGrad: same arguments, same four values returned.

    Checks the whole configuration first, on every process and before any of them waits for another;
    then compares it across the processes. Embeddings, output heads, norms and biases are left to
    full-rank Adam; ``targets`` and ``exclude`` in ``optimizer.params`` choose otherwise.

    Args:
        args: as in DeepSpeed; ``args.deepspeed_config`` is used if `config` is not given.
        model: the model.
        optimizer: as in DeepSpeed; None to build the one that the configuration names.
        model_parameters: as in DeepSpeed; None for all trainable parameters.
        *positional: DeepSpeed's further positional arguments.
        config: path, or dictionary.
        **others: DeepSpeed's further arguments.

    Returns:
        engine, optimizer, dataloader, learning-rate scheduler.

    Raises:
        ConfigError: a setting is unknown, ill-typed or cannot work; the message has its path.
        RuntimeError: on every process, if they were given different configurations.
    """
    given = config if config is not None else others.pop("config_params", None)
    if given is None:
        given = getattr(args, "deepspeed_config", None)
    loaded = load_deepspeed_config(given if given is not None else {})
    if optimizer is None:
        optimizer_settings(loaded)
    refuse_unsupported(loaded, cuda=torch.cuda.is_available())
    if optimizer is None and model_parameters is None and model is not None:
        model_parameters = [p for p in model.parameters() if p.requires_grad]
    import deepspeed

    if not dist.is_initialized():
        deepspeed.init_distributed(distributed_port=others.get("distributed_port", 29500))
    _compare_across_processes(loaded)
    if getattr(args, "deepspeed_config", None) is not None:
        # given through `config` below; DeepSpeed refuses to be told twice
        args = type(args)(**{**vars(args), "deepspeed_config": None})
    engine, wrapped, loader, scheduler = deepspeed.initialize(
        args, model, optimizer, model_parameters, *positional, config=loaded, **others
    )
    return engine, wrapped, loader, scheduler


def from_json(params: Iterable[Any], **settings: Any) -> AdaRankGrad:
    """What ``"optimizer": {"type": "AdaRankGrad"}`` builds.

    Raises:
        ConfigError: one line per unknown or ill-typed key, with its path.
    """
    parse_config(settings, "optimizer.params")
    groups = list(params)
    if any(isinstance(group, dict) and group.get("moe") for group in groups):
        raise ConfigError(_MOE)
    return AdaRankGrad(groups, **settings)


def introduce(optimizer_class: type) -> None:
    """Makes DeepSpeed accept the optimizer, and pass the guard before wrapping one; once.

    Raises:
        RuntimeError: this DeepSpeed has no place for the guard.
    """
    from deepspeed.runtime import engine as engine_module
    from deepspeed.runtime.zero import utils as zero_utils

    if optimizer_class not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
        zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(optimizer_class)
    engine_class = engine_module.DeepSpeedEngine
    check = getattr(engine_class, "_do_optimizer_sanity_check", None)
    if check is None:
        raise RuntimeError(
            "DeepSpeedEngine has no _do_optimizer_sanity_check; this version of DeepSpeed is not "
            "supported (tested: 0.19.8)"
        )
    if hasattr(check, "__wrapped__"):
        return

    @functools.wraps(check)
    def guarded(engine: Any, basic_optimizer: Any) -> Any:
        if isinstance(basic_optimizer, AdaRankGrad):
            refuse_unsupported(engine._config._param_dict, cuda=torch.cuda.is_available())
            _refuse_model(engine)
            name_parameters(basic_optimizer, engine.module)
        return check(engine, basic_optimizer)

    engine_class._do_optimizer_sanity_check = guarded


def name_parameters(optimizer: AdaRankGrad, model: nn.Module) -> None:
    """Gives bare parameters their names in `model`, and keeps embeddings and head full-rank.

    An optimizer whose groups say which matrices are low-rank keeps them as they are.

    Raises:
        ConfigError: a pattern of ``targets`` or ``exclude`` matches nothing.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    renamed = {
        old: names[identity]
        for identity, old in optimizer.parameter_names().items()
        if identity in names
    }
    full_rank: list[str] = []
    if not optimizer.is_classified:
        kinds = classify(
            model, targets=optimizer.defaults["targets"], exclude=optimizer.defaults["exclude"]
        )
        full_rank = [name for name, kind in kinds.items() if kind != "matrix"]
    optimizer.adopt_names(renamed, full_rank)


def _refuse_model(engine: Any) -> None:
    """Refuses what no configuration shows: models that are cut over processes by themselves."""
    if engine.has_moe_layers:
        raise ConfigError(_MOE)
    if engine.pipeline_parallelism:
        raise ConfigError(
            "model: got a PipelineModule; AdaRankGrad has not been made to work with DeepSpeed's "
            "pipeline stages; use ZeRO stages 0-3 without it"
        )
    if engine.mp_world_size > 1:
        raise ConfigError(
            f"mpu: got {engine.mp_world_size} model-parallel processes; AdaRankGrad needs whole "
            "matrices within a data-parallel group; leave mpu out"
        )


def _compare_across_processes(config: Mapping[str, Any]) -> None:
    if dist.get_world_size() == 1:
        return
    text = json.dumps(config, sort_keys=True, default=str)
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(text.encode()).hexdigest()[:16])
    different = [i for i, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise RuntimeError(
            "the processes were started with different DeepSpeed configurations: that of "
            f"process {', '.join(map(str, different))} is not that of process 0; start all of "
            "them with the same file"
        )


_MOE = (
    "model: got DeepSpeed MoE layers, whose experts are reduced over groups of their own; "
    "AdaRankGrad does not follow these groups; use a model without deepspeed.moe layers, or AdamW"
)

torch.optim.AdaRankGrad = from_json  # type: ignore[attr-defined]
