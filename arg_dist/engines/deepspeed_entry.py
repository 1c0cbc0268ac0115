"""Entry points for DeepSpeed: the JSON's optimizer name, :func:`initialize`, a client optimizer.

All three are checked by the same guard (``deepspeed_guard.py``).
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import warnings
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
    warn_defaults,
)
from arg_dist.engines.deepspeed_guard import MOE, introduce
from arg_dist.optimizer import AdaRankGrad


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: str | Path | Mapping[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | Path | Mapping[str, Any] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` for AdaRankGrad, with the same arguments and return values.

    Validates the whole configuration on every process before any communication, then checks that
    all processes have the same one. Embeddings, output heads, norms and biases are trained with
    full-rank Adam unless ``targets`` and ``exclude`` in ``optimizer.params`` select otherwise.

    Args:
        args: as in DeepSpeed; ``args.deepspeed_config`` is used if `config` is not given.
        model: the model.
        optimizer: as in DeepSpeed; None builds the one named in the configuration.
        model_parameters: as in DeepSpeed; None means all trainable parameters.
        training_data: as in DeepSpeed.
        lr_scheduler: as in DeepSpeed.
        distributed_port: as in DeepSpeed.
        mpu: as in DeepSpeed; model-parallel groups are refused.
        dist_init_required: as in DeepSpeed.
        collate_fn: as in DeepSpeed.
        config: path or dictionary.
        mesh_param: as in DeepSpeed.
        config_params: alias of `config`.

    Returns:
        engine, optimizer, dataloader, learning-rate scheduler.

    Raises:
        ConfigError: a setting is unknown, ill-typed or not supported; the message names its path.
        RuntimeError: on every process: the processes have different configurations.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError(
            "initialize: DeepSpeed is not installed; pip install 'arg-dist[deepspeed]'"
        )
    args, loaded = _one_config(args, config if config is not None else config_params)
    if optimizer is None:
        optimizer_settings(loaded)
    refuse_unsupported(loaded, cuda=torch.cuda.is_available())
    if optimizer is None and model_parameters is None and model is not None:
        model_parameters = [p for p in model.parameters() if p.requires_grad]
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    introduce(AdaRankGrad)
    if not dist.is_initialized():
        deepspeed.init_distributed(distributed_port=distributed_port)
    if "LOCAL_RANK" in os.environ:  # else all would communicate on device 0
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    _compare_across_processes(loaded)
    if dist.get_rank() == 0:
        for warning in warn_defaults(loaded):
            warnings.warn(warning, stacklevel=2)
    engine, wrapped, loader, scheduler = deepspeed.initialize(
        args,
        model,
        optimizer,
        model_parameters,
        training_data,
        lr_scheduler,
        distributed_port,
        mpu,
        dist_init_required,
        collate_fn,
        loaded,
        mesh_param,
    )
    return engine, wrapped, loader, scheduler


def _one_config(
    args: Any, config: str | Path | Mapping[str, Any] | None
) -> tuple[Any, dict[str, Any]]:
    """Returns `args` without the configuration, and the configuration, however it was given."""
    named = getattr(args, "deepspeed_config", None)
    if named is None:
        return args, load_deepspeed_config(config if config is not None else {})
    if config is not None:
        raise ConfigError(f"config: given, and args.deepspeed_config ({named}) too; remove one")
    args = copy.copy(args)
    args.deepspeed_config = None
    return args, load_deepspeed_config(named)


def from_json(params: Iterable[Any], **settings: Any) -> AdaRankGrad:
    """Builds the optimizer for ``"optimizer": {"type": "AdaRankGrad"}``.

    Raises:
        ConfigError: one line per unknown or ill-typed key, with its path.
    """
    parse_config(settings, "optimizer.params")
    groups = list(params)
    if any(isinstance(group, dict) and group.get("moe") for group in groups):
        raise ConfigError(MOE)
    return AdaRankGrad(groups, **settings)


def _compare_across_processes(config: Mapping[str, Any]) -> None:
    if dist.get_world_size() == 1:
        return
    mine = {key: _digest(value) for key, value in config.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    first = everyone[0]
    for process, theirs in enumerate(everyone):
        keys = sorted(
            key for key in first.keys() | theirs.keys() if first.get(key) != theirs.get(key)
        )
        if keys:
            raise RuntimeError(
                "the processes were started with different DeepSpeed configurations: that of "
                f"process {process} differs from that of process 0 in {', '.join(keys)}; start all "
                "processes with the same file"
            )


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def offer_by_name() -> None:
    """Makes DeepSpeed find the optimizer of a JSON: it looks up names in ``torch.optim``."""
    torch.optim.AdaRankGrad = from_json  # type: ignore[attr-defined]
