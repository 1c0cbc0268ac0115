"""Llama models by name, in the sizes of the GaLore and Llama papers, or any model from a path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from arg_dist.config import ConfigError
from arg_dist.planning.local_models import check_positions, config_at

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class LlamaSize:
    """Dimensions of a Llama model, except its vocabulary size."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int | None = None

    @property
    def key_value_width(self) -> int:
        """Rows of the key and value projections; fewer than `hidden` with grouped-query heads."""
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

LLAMA_PLAN = {
    "lm_head": "colwise_gather_output",
    "model.embed_tokens": "embedding_rowwise",
    **dict.fromkeys(
        (f"model.layers.*.self_attn.{each}_proj" for each in ("q", "k", "v")), "colwise"
    ),
    **dict.fromkeys((f"model.layers.*.mlp.{each}_proj" for each in ("gate", "up")), "colwise"),
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}
"""Transformers' tensor-parallel plan of a Llama."""


def model_config(name: str, *, vocab_size: int, length: int) -> PretrainedConfig:
    """The configuration of a size in :data:`LLAMA_SIZES`, or the one at a path.

    Raises:
        ConfigError: `name` is neither, or the model at the path has a vocabulary smaller than
            `vocab_size` or fewer positions than `length`.
    """
    if size := LLAMA_SIZES.get(name):
        from transformers import LlamaConfig

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
        raise ConfigError(f"--model {name}: neither a path nor one of {', '.join(LLAMA_SIZES)}")
    config = config_at(name)
    config.use_cache = False
    text = config.get_text_config()
    if text.vocab_size < vocab_size:
        raise ConfigError(
            f"--model {name}: has {text.vocab_size} tokens, but the tokenizer has {vocab_size}; "
            "pass the model's own with --tokenizer"
        )
    check_positions(name, config, length, "--seq-len")
    return config


def skeleton(size: LlamaSize, vocab_size: int) -> nn.Module:
    """The parameters of transformers' Llama, with the same names and order, without weights.

    Args:
        size: dimensions of the model.
        vocab_size: size of the vocabulary.

    Returns:
        Modules on the ``meta`` device that have no forward; they need no transformers.
    """
    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(vocab_size, size.hidden),
                "layers": nn.ModuleList(_layer(size) for _ in range(size.layers)),
                "norm": nn.RMSNorm(size.hidden),
            }
        )
        return nn.ModuleDict({"model": model, "lm_head": _linear(size.hidden, vocab_size)})


def _layer(size: LlamaSize) -> nn.ModuleDict:
    attention = {
        "q_proj": _linear(size.hidden, size.hidden),
        "k_proj": _linear(size.hidden, size.key_value_width),
        "v_proj": _linear(size.hidden, size.key_value_width),
        "o_proj": _linear(size.hidden, size.hidden),
    }
    mlp = {
        "gate_proj": _linear(size.hidden, size.intermediate),
        "up_proj": _linear(size.hidden, size.intermediate),
        "down_proj": _linear(size.intermediate, size.hidden),
    }
    return nn.ModuleDict(
        {
            "self_attn": nn.ModuleDict(attention),
            "mlp": nn.ModuleDict(mlp),
            "input_layernorm": nn.RMSNorm(size.hidden),
            "post_attention_layernorm": nn.RMSNorm(size.hidden),
        }
    )


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)
