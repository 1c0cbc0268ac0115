"""Models to train: initialized from a seed, or loaded from a local directory."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from arg_dist.planning.local_models import has_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def build_model(
    name: str, config: PretrainedConfig, *, seed: int, deepspeed_config: dict[str, Any]
) -> PreTrainedModel:
    """The model of `config`: weights from the directory `name` if it has any, else from `seed`.

    Under ZeRO-3 it is sharded at construction (``deepspeed.zero.Init``), never whole on one
    process. Weights from `seed` are the same in every ZeRO stage.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    # transformers shards models at construction for as long as this object is alive.
    zero3 = HfDeepSpeedConfig(deepspeed_config) if zero_stage(deepspeed_config) == 3 else None
    if has_weights(name):
        model = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=torch.float32, local_files_only=True
        )
    else:
        model = _fresh_model(config, seed, in_pieces=zero3 is not None)
    del zero3
    return model


def _fresh_model(config: PretrainedConfig, seed: int, *, in_pieces: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    # Construction consumes random numbers in some stages and not in others; so weights are drawn
    # only once all modules exist, in module order.
    torch.manual_seed(seed)
    if in_pieces:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.init_weights()
    return model


def zero_stage(deepspeed_config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration; 0 if unset."""
    with contextlib.suppress(AttributeError, TypeError, ValueError):
        return int(deepspeed_config.get("zero_optimization", {}).get("stage", 0))
    return 0


def count_parameters(model: torch.nn.Module) -> int:
    """The number of elements of all parameters; ZeRO-3 keeps the full count in `ds_numel`."""
    return sum(
        getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters()
    )
