"""The DeepSpeed JSON of a job, completed by the command line."""

from __future__ import annotations

from typing import Any, NamedTuple

from arg_dist.cli.parsing import InputError
from arg_dist.config import ConfigError, current_names, parse_config
from arg_dist.engines.deepspeed_config import load_deepspeed_config

ADAMW_KEYS = ("lr", "betas", "eps", "weight_decay")
OPTIMIZERS = ("adarankgrad", "adamw")


class Batch(NamedTuple):
    """Sequences per step, sequences per micro batch, and micro batches per process and step."""

    total: int
    micro: int
    accumulation: int


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """The JSON at `path`, without its ``"auto"`` values.

    Raises:
        InputError: the file does not exist, or is not a JSON object.
    """
    try:
        return without_auto(load_deepspeed_config(path))
    except ConfigError as error:
        raise InputError(str(error)) from None


def without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """A copy of `section` without ``"auto"`` values, nested sections included."""
    return {
        key: without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != "auto"
    }


def choose_optimizer(config: dict[str, Any], wanted: str | None) -> str:
    """`wanted`, or else the JSON's optimizer, or else AdaRankGrad."""
    named = wanted or str(config.get("optimizer", {}).get("type", "adarankgrad")).lower()
    if named not in OPTIMIZERS:
        raise InputError(
            f"optimizer.type: got {named!r}; this job supports {' and '.join(OPTIMIZERS)}; "
            "choose one with --optimizer"
        )
    return named


def set_optimizer(
    config: dict[str, Any], name: str, overrides: dict[str, Any], lr: float | None
) -> dict[str, Any]:
    """Merges `overrides` and `lr` into the ``optimizer`` section and returns all its settings.

    For ``adamw`` only the keys that AdamW shares are kept, so one JSON serves both optimizers;
    missing keys take AdaRankGrad's defaults, so that the two runs differ in the method alone.

    Raises:
        InputError: a key is unknown, or its value is invalid.
        ConfigError: a setting has two names in the JSON.
    """
    params = current_names(config.get("optimizer", {}).get("params", {}), "optimizer.params")
    if name == "adamw":
        for key in overrides:
            if key not in ADAMW_KEYS:
                raise InputError(f"--set {key}: adamw accepts only {', '.join(ADAMW_KEYS)}")
        params = {key: value for key, value in params.items() if key in ADAMW_KEYS}
    params |= overrides
    if lr is not None:
        params["lr"] = lr
    try:
        settings = parse_config(params, where="optimizer.params").model_dump(mode="json")
    except ConfigError as error:
        raise InputError(str(error)) from None
    if name == "adamw":
        params = settings = {key: settings[key] for key in ADAMW_KEYS}
    type_name = {"adarankgrad": "AdaRankGrad", "adamw": "AdamW"}[name]
    config["optimizer"] = {"type": type_name, "params": params}
    return settings


def set_batch(config: dict[str, Any], wanted: int | None, world_size: int) -> Batch:
    """Resolves the batch sizes for `world_size` processes and writes them to `config`.

    `wanted` replaces the JSON's ``train_batch_size``. Missing values are derived; a given micro
    batch is kept, because it is what fits into memory.

    Raises:
        InputError: the sizes are inconsistent.
    """
    total = config.get("train_batch_size") if wanted is None else wanted
    micro = config.get("train_micro_batch_size_per_gpu")
    accumulation = config.get("gradient_accumulation_steps")
    for key, value in (
        ("train_batch_size", total),
        ("train_micro_batch_size_per_gpu", micro),
        ("gradient_accumulation_steps", accumulation),
    ):
        if value is not None and (type(value) is not int or value < 1):
            raise InputError(f"{key}: a whole number of at least 1 is needed, got {value!r}")
    if total is None:
        if micro is None:
            raise InputError(
                "no batch size: pass --batch-size, or set train_batch_size in the JSON"
            )
        total = micro * (accumulation or 1) * world_size
    if total % world_size:
        raise InputError(
            f"the batch of {total} sequences cannot be divided among {world_size} processes; "
            f"pass a multiple of {world_size} with --batch-size"
        )
    share = total // world_size
    if micro is None:
        micro, rest = divmod(share, accumulation or 1)
    elif accumulation is None or wanted is not None:
        rest = share % micro
    else:
        rest = share - micro * accumulation
    if rest or micro < 1:
        raise InputError(
            f"the batch of {total} sequences on {world_size} processes is not divisible into micro "
            f"batches of {config.get('train_micro_batch_size_per_gpu', 'any size')} with "
            f"{accumulation} accumulation steps"
        )
    accumulation = share // micro
    config |= {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
    }
    return Batch(total, micro, accumulation)
