"""The pretrained checkpoint to fine-tune: a local Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from arg_dist.cli.parsing import InputError
from arg_dist.planning.local_models import (
    WEIGHTS,
    check_positions,
    config_at,
    has_weights,
    tokenizer_at,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def read_config(directory: str, max_length: int) -> PretrainedConfig:
    """The configuration of the model in `directory`.

    Raises:
        InputError: it holds no model with weights, or one with fewer positions than `max_length`.
    """
    if not Path(directory).is_dir():
        raise InputError(f"--model {directory}: no such directory")
    if not has_weights(directory):
        raise InputError(f"--model {directory}: holds no weights ({' or '.join(WEIGHTS)})")
    config = config_at(directory)
    check_positions(directory, config, max_length, "--max-length")
    return config


def read_tokenizer(directory: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer; without a padding token it pads with the end-of-text token.

    Raises:
        InputError: the directory holds none.
    """
    tokenizer = tokenizer_at(directory, "--model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(auto_class: Any, directory: str, **settings: Any) -> PreTrainedModel:
    """The model in fp32; weights missing from the checkpoint (a new head) are initialized.

    Raises:
        InputError: the checkpoint does not fit `auto_class`.
    """
    try:
        return auto_class.from_pretrained(
            directory, local_files_only=True, dtype=torch.float32, **settings
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"--model {directory}: {auto_class.__name__}: {first}") from None
