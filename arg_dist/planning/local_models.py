"""What a local Hugging Face directory holds: configuration, weights, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from arg_dist.config import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""The files in which a directory keeps a model's weights."""


def has_weights(directory: str) -> bool:
    """Whether a model's weights lie in `directory`."""
    return any(any(Path(directory).glob(weights)) for weights in WEIGHTS)


def config_at(directory: str) -> PretrainedConfig:
    """The configuration of the model in `directory`.

    Raises:
        ConfigError: there is none, or transformers is not installed.
    """
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ConfigError(
            f"--model {directory}: transformers is needed to read it; "
            "pip install 'arg-dist[transformers]'"
        ) from None

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError):
        raise ConfigError(f"--model {directory}: holds no Hugging Face config.json") from None


def check_positions(directory: str, config: PretrainedConfig, length: int, option: str) -> None:
    """Looks whether sequences of `length` tokens, as `option` says, fit the model.

    Raises:
        ConfigError: it has fewer positions.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < length:
        raise ConfigError(f"{option} {length}: --model {directory} has {positions} positions")


def tokenizer_at(directory: str, option: str) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`, which `option` names.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError):
        raise ConfigError(f"{option} {directory}: holds no Hugging Face tokenizer") from None
