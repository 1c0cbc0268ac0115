"""What small jobs of the launchers read: real text, and the configuration of a tiny Llama."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig

from tests.launch.launching import ROOT
from tests.launch.models import TINY_LLAMA


def write_text(folder: Path) -> Path:
    """A few source files, read in a moment; returns the folder."""
    for source in sorted((ROOT / "arg_dist/subspace").glob("*.py")):
        (folder / source.name).write_text(source.read_text())
    return folder


def llama_config() -> LlamaConfig:
    """For tokens that are bytes."""
    return LlamaConfig(vocab_size=258, **TINY_LLAMA)
