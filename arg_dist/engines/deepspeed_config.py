"""Read and validate a DeepSpeed config for AdaRankGrad.

Pure functions on dictionaries: they need neither DeepSpeed nor a process group, so a config can be
checked before a launch. Key names and defaults are those of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arg_dist.config import AdaRankGradConfig, ConfigError, parse_config
from arg_dist.engines.deepspeed_rules import RULES, read_facts, shown, value

OPTIMIZER_TYPE = "AdaRankGrad"
"""Value of ``optimizer.type``. It is case-sensitive: DeepSpeed lower-cases only its own names and
looks up any other in ``torch.optim`` unchanged."""

FOREIGN_PARAMS = {
    "max_grad_norm": "set the top-level key 'gradient_clipping'",
    "torch_adam": "remove it",
    "adam_w_mode": "remove it: the weight decay is decoupled, as in AdamW",
}
"""Keys of ``optimizer.params`` left over from DeepSpeed's Adam, and the remedy for each."""

KNOWN_KEYS = frozenset(
    """
    activation_checkpointing aio allgather_size autotuning bf16 bfloat16 checkpoint comet
    comms_logger communication_data_type compile csv_monitor data_efficiency data_parallel_size
    data_types dataloader_drop_last datastates_ckpt disable_allgather disable_python_gc dump_state
    expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op
    gradient_clipping gradient_predivide_factor hybrid_engine log_level
    managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel
    tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb
    weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization
    """.split()
)
"""Top-level keys that DeepSpeed reads; it silently ignores any other."""


def load_deepspeed_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Reads a config from a path, a JSON string (beginning with `{`), or a mapping.

    Raises:
        ConfigError: the file cannot be read, is not valid JSON, contains a duplicate key, or is
            not an object.
    """
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, str) and config.lstrip().startswith("{"):
        source, text = "DeepSpeed config", config
    else:
        source = str(config)
        try:
            text = Path(config).read_text(encoding="utf-8")
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"{source}: DeepSpeed config cannot be read: {reason}") from None
    try:
        loaded = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{source}: not valid JSON at {where}: {error.msg}") from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{source}: got a JSON {type(loaded).__name__}; an object is needed")
    return loaded


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"key '{key}' is given twice; remove one of them")
    return dict(pairs)


def optimizer_settings(config: Mapping[str, Any]) -> AdaRankGradConfig:
    """Returns the validated settings of the config's ``optimizer`` section.

    Raises:
        ConfigError: the section is missing or names another type, or ``optimizer.params`` has an
            unknown key or a value that is ill-typed, contradictory or still ``"auto"``.
    """
    section = config.get("optimizer")
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"optimizer: got {shown(section)}; "
            f'{{"type": "{OPTIMIZER_TYPE}", "params": {{...}}}} is needed'
        )
    kind = section.get("type")
    if kind != OPTIMIZER_TYPE:
        near = difflib.get_close_matches(str(kind).lower(), [OPTIMIZER_TYPE.lower()])
        hint = f"; did you mean '{OPTIMIZER_TYPE}'?" if near else f"; '{OPTIMIZER_TYPE}' is needed"
        raise ConfigError(f"optimizer.type: got {shown(kind)}{hint}")
    params = section.get("params") or {}
    if not isinstance(params, Mapping):
        raise ConfigError(f"optimizer.params: got {shown(params)}; an object is needed")
    lines = [
        f'optimizer.params.{key}: got "auto", which only the Trainer of transformers and '
        "accelerate replace with a value; give a number"
        for key in ("lr", "betas", "eps", "weight_decay")
        if params.get(key) == "auto"
    ]
    lines += [
        f"optimizer.params.{key}: belongs to another optimizer; {instead}"
        for key, instead in FOREIGN_PARAMS.items()
        if key in params
    ]
    if lines:
        raise ConfigError("\n".join(lines))
    return parse_config(params, where="optimizer.params")


def refuse_unsupported(config: Mapping[str, Any], *, cuda: bool) -> None:
    """Refuses settings that AdaRankGrad does not support, and misspelled top-level keys.

    Args:
        config: a DeepSpeed config; a value of ``"auto"`` counts as not given, as in DeepSpeed.
        cuda: whether training runs on a CUDA device.

    Raises:
        ConfigError: one line per error: the key's path, what was given, the reason and the remedy.
    """
    facts = read_facts(config, cuda=cuda)
    lines = [
        f"{key}: unknown key, which DeepSpeed would ignore; did you mean '{near[0]}'? "
        "(for a section of your own, use a less similar name)"
        for key in config
        if key not in KNOWN_KEYS
        and (near := difflib.get_close_matches(key, KNOWN_KEYS, n=1, cutoff=0.8))
    ]
    for rule in RULES:
        given = value(config, rule.path, rule.default)
        if rule.refuses(given, facts):
            left_out = value(config, rule.path) is None and given is not None
            got = f"nothing, which means {shown(given)}" if left_out else shown(given)
            lines.append(f"{rule.path}: got {got}; {rule.reason}; {rule.instead}")
    if lines:
        raise ConfigError("\n".join(lines))


def warn_defaults(config: Mapping[str, Any]) -> list[str]:
    """Returns one line for each setting that is left at a surprising default of DeepSpeed."""
    lines = []
    if "gradient_clipping" not in config:
        lines.append(
            "gradient_clipping: not set; DeepSpeed clips at 1.0; set it (0 disables clipping)"
        )
    zero = config.get("zero_optimization", {})
    if isinstance(zero, Mapping) and "stage" not in zero:
        lines.append("zero_optimization.stage: not set; DeepSpeed uses 0, which shards nothing")
    return lines
