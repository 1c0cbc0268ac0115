"""Llama models by name, in the sizes of the GaLore and Llama papers, or any model from a path."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from arg_dist.lm import InputError
from arg_dist.lm.local_checkpoints import check_positions, config_at, has_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class LlamaSize:
    """Dimensions of a Llama without its vocabulary."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int | None = None

    @property
    def key_value_width(self) -> int:
        """Rows of the matrices of keys and values; fewer than `hidden` where heads share them."""
        return self.hidden // self.heads * (self.key_value_heads or self.heads)


LLAMA_SIZES = {
    "pico": LlamaSize(128, 344, 4, 4),
    "nano": LlamaSize(192, 512, 6, 6),
    "60m": LlamaSize(512, 1376, 8, 8),
    "130m": LlamaSize(768, 2048, 12, 12),
    "350m": LlamaSize(1024, 2736, 24, 16),
    "1b": LlamaSize(2048, 5461, 24, 32),
    "7b": LlamaSize(4096, 11008, 32, 32),
    "13b": LlamaSize(5120, 13824, 40, 40),
    "70b": LlamaSize(8192, 28672, 80, 64, key_value_heads=8),
}


def model_config(name: str, *, vocab_size: int, length: int) -> PretrainedConfig:
    """The configuration of a size in :data:`LLAMA_SIZES`, or the one at a path.

    Raises:
        InputError: neither; or the model at the path has fewer tokens than `vocab_size`, or
            fewer positions than `length`.
    """
    from transformers import LlamaConfig

    if size := LLAMA_SIZES.get(name):
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.key_value_heads or size.heads,
            max_position_embeddings=max(1024, length),
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            use_cache=False,
        )
    if not Path(name).exists():
        raise InputError(f"--model {name}: neither a path nor one of {', '.join(LLAMA_SIZES)}")
    config = config_at(name)
    config.use_cache = False
    text = config.get_text_config()
    if text.vocab_size < vocab_size:
        raise InputError(
            f"--model {name} knows {text.vocab_size} tokens and the tokenizer has {vocab_size}: "
            "give the model's own with --tokenizer"
        )
    check_positions(name, config, length, "--seq-len")
    return config


def build_model(
    name: str, config: PretrainedConfig, *, seed: int, deepspeed_config: dict[str, Any]
) -> PreTrainedModel:
    """The model of `config`: weights from the directory `name` if it has any, else from `seed`.

    Under ZeRO-3 it is born in pieces (``deepspeed.zero.Init``), never whole on one process. The
    fresh weights are the same in every ZeRO stage.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    # transformers cuts models while it builds them for as long as this object lives.
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

    # Construction alone draws numbers in some stages and not in others; so nothing is drawn
    # until all modules stand, and then in their order.
    torch.manual_seed(seed)
    if in_pieces:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.init_weights()
    return model


def zero_stage(deepspeed_config: dict[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed configuration asks for; 0 if it says nothing."""
    with contextlib.suppress(AttributeError, TypeError, ValueError):
        return int(deepspeed_config.get("zero_optimization", {}).get("stage", 0))
    return 0


def count_parameters(model: torch.nn.Module) -> int:
    """The elements of all parameters; ZeRO-3 keeps the full number in `ds_numel`."""
    return sum(
        getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters()
    )
