"""Every DeepSpeed setting that AdaRankGrad does not support, one rule each.

The optimizer requires DeepSpeed to call `step()` on every process, on partitions whose gradients
are final, and to save its `state_dict()`. Each rule names a setting that breaks one of these, or
whose error in DeepSpeed does not state the remedy. Source locations in comments are relative to the
package of DeepSpeed 0.19.8.

Allowed, because they do not change what the optimizer receives: clipping, scaling and type of the
gradient reduction, bf16, buckets, `round_robin_gradients`, hpZ, parameter offload, DeepCompile,
hybrid engine, data efficiency, schedulers. DeepSpeed itself refuses the keys that it has removed
(`amp`, `sparse_gradients`, `mics_shard_size`, ...). Pipeline and Megatron parallelism and
DeepSpeed's own MoE layers belong to the model, not to the config.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from arg_dist.config import ConfigError

_HALF = ("fp16", "float16", "half", "torch.float16")
_BRAIN = ("bf16", "bfloat16", "torch.bfloat16")


@dataclass(frozen=True)
class Facts:
    """What a rule may check in addition to the value of its own key."""

    config: Mapping[str, Any]
    stage: int
    offload: str
    """Device to which the optimizer state is offloaded: ``none``, ``cpu`` or ``nvme``."""
    dtype: str
    """The weights' type: ``fp32``, ``fp16`` or ``bf16``."""
    cuda: bool

    def on(self, path: str) -> bool:
        """Whether the flag at a dotted path is true."""
        return on(value(self.config, path))


@dataclass(frozen=True)
class Rule:
    """One unsupported setting: its path, when it is refused, the reason and the remedy."""

    path: str
    refuses: Callable[[Any, Facts], bool]
    reason: str
    instead: str
    default: Any = None


def _set_on(given: Any, facts: Facts) -> bool:
    return on(given)


RULES = (
    # engine.py:3372 scales the loss for a ZeROOptimizer only; FP16_UnfusedOptimizer unscales it.
    Rule(
        "fp16.enabled",
        lambda given, facts: on(given) and facts.stage == 0,
        "at stage 0 DeepSpeed divides the gradients by a loss scale that it never applied",
        "use bf16, or zero_optimization.stage 1, 2 or 3",
    ),
    # stage_1_and_2.py:2976, stage3.py:1240: GradScaler.step looks for infinities in this process's
    # partition only. Stage 0 (engine.py:3513) checks gradients that are equal on all processes.
    Rule(
        "torch_autocast.dtype",
        lambda given, facts: (
            given in _HALF and facts.on("torch_autocast.enabled") and facts.stage > 0
        ),
        "one process may skip a step that the others take, and training would hang",
        "use bfloat16, or fp16.enabled without torch_autocast",
    ),
    # engine.py:2323 raises NotImplementedError("unsupported mix").
    Rule(
        "data_types.grad_accum_dtype",
        lambda given, facts: given and facts.stage == 0 and _dtype(given) != facts.dtype,
        "at stage 0 DeepSpeed can accumulate gradients in the type of the weights only",
        "remove it, or use zero_optimization.stage 1, 2 or 3",
    ),
    # stage_1_and_2.py:3358 saves the flat tensors of optimizer.state instead of state_dict().
    Rule(
        "zero_optimization.elastic_checkpoint",
        lambda given, facts: on(given) and facts.stage in (1, 2),
        "AdaRankGrad's state would silently be left out of checkpoints",
        "set it to false",
    ),
    # stage_1_and_2.py:824 links weights to the offsets that they would have without round robin,
    # and loads universal checkpoints there.
    Rule(
        "checkpoint.load_universal",
        lambda given, facts: (
            on(given)
            and facts.stage in (1, 2)
            and facts.on("zero_optimization.round_robin_gradients")
        ),
        "with round_robin_gradients DeepSpeed loads the weights of universal checkpoints to wrong "
        "offsets",
        "set zero_optimization.round_robin_gradients to false",
    ),
    # swap_tensor/optimizer_utils.py:493 swaps each tensor of optimizer.state as if it were Adam's.
    Rule(
        "zero_optimization.offload_optimizer.device",
        lambda given, facts: facts.offload == "nvme",
        "DeepSpeed's NVMe swapper supports only states as large as the weights",
        'use "cpu": a low-rank state is small',
    ),
    # stage3.py:314: a second optimizer, AdamW, steps the share on the accelerator.
    Rule(
        "zero_optimization.offload_optimizer.ratio",
        lambda given, facts: facts.offload != "none" and _number(given) < 1,
        "DeepSpeed would train the part on the accelerator with AdamW",
        "set it to 1.0",
        default=1.0,
    ),
    # superoffload_stage3.py builds its own Adam from the groups.
    Rule(
        "zero_optimization.offload_optimizer.super_offload",
        _set_on,
        "SuperOffload replaces the optimizer with its own Adam",
        "set it to false",
    ),
    # zenflow/zenflow_stage_1_and_2.py and engine_stage3.py step selected columns themselves.
    Rule(
        "zero_optimization.zenflow",
        lambda given, facts: given is not None,
        "ZenFlow replaces the optimizer with its own selective Adam",
        "remove the section",
    ),
    # engine.py:2344 raises for an optimizer object, and accelerate silently replaces it. Neither
    # applies to an optimizer named in the JSON.
    Rule(
        "zero_force_ds_cpu_optimizer",
        lambda given, facts: (
            on(given) and facts.offload != "none" and value(facts.config, "optimizer.type") is None
        ),
        "with offload_optimizer the optimizer would be refused, or replaced with DeepSpeedCPUAdam",
        "set it to false",
        default=True,
    ),
    # base_optimizer.py:484: both require type(optimizer) == DeepSpeedCPUAdam, except bf16 weights
    # with bf16 states on the accelerator.
    Rule(
        "fp16.fp16_master_weights_and_grads",
        _set_on,
        "DeepSpeed allows fp16 master weights for DeepSpeedCPUAdam only",
        "set it to false",
    ),
    Rule(
        "bf16.bf16_master_weights_and_grads",
        lambda given, facts: (
            on(given) and not (facts.on("bf16.bf16_optimizer_states") and facts.offload == "none")
        ),
        "DeepSpeed allows bf16 master weights for DeepSpeedCPUAdam only",
        "set it to false, or set bf16.bf16_optimizer_states to true and do not offload",
    ),
    # compile/passes/offload_adam_states.py moves exp_avg and exp_avg_sq by name.
    Rule(
        "compile.offload_opt_states",
        _set_on,
        "DeepCompile can offload the state of Adam only",
        "set it to false",
    ),
    # runtime/tensor_parallel: a parameter becomes this process's slice of the matrix, and the
    # data-parallel group contains only the processes with the same slice.
    Rule(
        "tensor_parallel.autotp_size",
        lambda given, facts: _number(given) > 1,
        "AdaRankGrad would treat each slice as a separate matrix",
        "set it to 1 and shard with ZeRO",
        default=0,
    ),
    # engine.py:2228: each set of experts is partitioned over a smaller process group.
    Rule(
        "expert_parallel.autoep_size",
        lambda given, facts: _number(given) > 1 and facts.on("expert_parallel.enabled"),
        "processes would hold different experts under the same parameter names",
        "set it to 1",
        default=1,
    ),
    # partition_parameters.py:1154: the op builder has no CPU implementation.
    *(
        Rule(
            f"zero_optimization.{key}",
            lambda given, facts: on(given) and not facts.cuda,
            "ZeRO++ quantizes with a CUDA kernel, and there is no CUDA device",
            "set it to false",
        )
        for key in (
            "zero_quantized_weights",
            "zero_quantized_nontrainable_weights",
            "zero_quantized_gradients",
        )
    ),
)


def read_facts(config: Mapping[str, Any], *, cuda: bool) -> Facts:
    """Extracts from `config` what the rules check.

    Raises:
        ConfigError: ``zero_optimization`` or its stage is not valid in DeepSpeed.
    """
    offload = value(config, "zero_optimization.offload_optimizer.device", "none")
    if offload == "none" and on(value(config, "zero_optimization.cpu_offload")):
        offload = "cpu"  # the deprecated spelling of offload_optimizer
    bf16 = "bf16" if config.get("bf16") is not None else "bfloat16"
    half = "fp16" if on(value(config, "fp16.enabled")) else "fp32"
    return Facts(
        config=config,
        stage=_stage(config),
        offload=offload,
        dtype="bf16" if on(value(config, f"{bf16}.enabled")) else half,
        cuda=cuda,
    )


def _stage(config: Mapping[str, Any]) -> int:
    section = config.get("zero_optimization", {})
    if isinstance(section, bool):  # the deprecated form: true means stage 1
        return int(section)
    if not isinstance(section, Mapping):
        raise ConfigError(f"zero_optimization: got {shown(section)}; an object is needed")
    stage = section.get("stage", 0)
    if type(stage) is not int or stage not in range(4):  # DeepSpeed treats "auto" as 0
        raise ConfigError(f"zero_optimization.stage: got {shown(stage)}; 0, 1, 2 or 3 is needed")
    return stage


def value(config: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """Returns the value at a dotted path; `default` if it or one of its sections is missing."""
    found: Any = config
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return default if found is None or found == "auto" else found


def on(given: Any) -> bool:
    """Whether a flag is true, in any spelling that pydantic, and so DeepSpeed, accepts."""
    return str(given).lower() in ("true", "1", "yes", "on", "t", "y")


def _number(given: Any) -> float:
    """Converts to a number; NaN, which no rule refuses, if DeepSpeed will refuse the value."""
    try:
        return float(given)
    except (TypeError, ValueError):
        return math.nan


def _dtype(name: str) -> str:
    """Normalizes DeepSpeed's spellings of a type to ``fp32``, ``fp16`` or ``bf16``."""
    return "fp16" if name in _HALF else "bf16" if name in _BRAIN else "fp32"


def shown(given: Any) -> str:
    """Formats `given` as JSON, for error messages."""
    return "nothing" if given is None else json.dumps(given, default=repr)
