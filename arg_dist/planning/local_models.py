"""Read a local Hugging Face directory: configuration, weights, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from arg_dist.config import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""Patterns of weight files in a model directory."""


def has_weights(directory: str) -> bool:
    """Whether `directory` contains model weights."""
    return any(any(Path(directory).glob(weights)) for weights in WEIGHTS)


def config_at(directory: str) -> PretrainedConfig:
    """Load the configuration of the model in `directory`.

    Raises:
        ConfigError: no configuration was found, or transformers is not installed.
    """
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ConfigError(
            f"--model {directory}: reading it requires transformers; "
            "run pip install 'arg-dist[transformers]'"
        ) from None

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError):
        raise ConfigError(f"--model {directory}: no Hugging Face config.json found") from None


def check_positions(directory: str, config: PretrainedConfig, length: int, option: str) -> None:
    """Check that sequences of `length` tokens, the value of `option`, fit the model.

    Raises:
        ConfigError: the model has fewer positions.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < length:
        raise ConfigError(f"{option} {length}: --model {directory} has only {positions} positions")


def tokenizer_at(directory: str, option: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `directory`, the value of `option`.

    Raises:
        ConfigError: no tokenizer was found.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError):
        raise ConfigError(f"{option} {directory}: no Hugging Face tokenizer found") from None
