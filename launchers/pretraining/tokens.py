"""Token streams, and the sequences that a process reads from them at each step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from arg_dist.cli.parsing import InputError
from arg_dist.planning.local_models import tokenizer_at
from launchers.pretraining.corpus import Corpus


class Tokenizer(Protocol):
    """Encodes documents into a token stream."""

    vocab_size: int
    eos_id: int

    def encode(self, documents: Sequence[bytes]) -> np.ndarray:
        """One array: the tokens of each document, each document closed by `eos_id`."""


class ByteTokenizer:
    """One token per byte, plus one each for the beginning and the end of a text."""

    bos_id = 256
    eos_id = 257
    vocab_size = 258

    def encode(self, documents: Sequence[bytes]) -> np.ndarray:
        """One array: the bytes of each document, each document closed by `eos_id`."""
        tokens = np.full(sum(len(document) + 1 for document in documents), self.eos_id, np.uint16)
        position = 0
        for document in documents:
            tokens[position : position + len(document)] = np.frombuffer(document, np.uint8)
            position += len(document) + 1
        return tokens


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer from a local directory."""

    def __init__(self, directory: str) -> None:
        if not Path(directory).is_dir():
            raise InputError(f"--tokenizer {directory}: no such directory")
        self._tokenizer = tokenizer_at(directory, "--tokenizer")
        if self._tokenizer.eos_token_id is None:
            raise InputError(f"--tokenizer {directory}: has no end-of-text token (eos_token)")
        self.eos_id: int = self._tokenizer.eos_token_id
        self.vocab_size: int = len(self._tokenizer)

    def encode(self, documents: Sequence[bytes]) -> np.ndarray:
        """One array: the tokens of each document, each document closed by `eos_id`."""
        width = np.uint16 if self.vocab_size <= 2**16 else np.int32
        parts = []
        for document in documents:
            text = document.decode("utf-8", errors="replace")
            ids = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
            parts.append(np.asarray([*ids, self.eos_id], dtype=width))
        return np.concatenate(parts) if parts else np.empty(0, width)


def load_tokenizer(directory: str | None) -> Tokenizer:
    """The tokenizer in `directory`; bytes if None."""
    return HuggingFaceTokenizer(os.path.expanduser(directory)) if directory else ByteTokenizer()


@dataclass(frozen=True)
class Sequences:
    """Fixed-length sequences from a training and a held-out token stream.

    Sequence `i` of step `s` depends only on `(seed, s, i)`, so a run sees the same global batches
    on any number of processes and with any accumulation.
    """

    training: np.ndarray
    held_out: np.ndarray
    length: int
    seed: int
    vocab_size: int
    source: str

    @classmethod
    def of(cls, corpus: Corpus, tokenizer: Tokenizer, *, length: int, seed: int) -> Sequences:
        """Tokenizes `corpus`.

        Raises:
            InputError: a part is shorter than one sequence.
        """
        training, held_out = tokenizer.encode(corpus.training), tokenizer.encode(corpus.held_out)
        for name, tokens in (("training", training), ("held-out", held_out)):
            if len(tokens) < length:
                raise InputError(
                    f"--seq-len {length}: the {name} part of {corpus.source} has only "
                    f"{len(tokens)} tokens; use more text or shorter sequences"
                )
        return cls(training, held_out, length, seed, tokenizer.vocab_size, corpus.source)

    def batch(self, step: int, indices: range) -> torch.Tensor:
        """Training sequences `indices` of the global batch of `step`: `len(indices) x length`."""
        last = len(self.training) - self.length
        starts = [
            int(np.random.default_rng((self.seed, step, index)).integers(last, endpoint=True))
            for index in indices
        ]
        return self._cut(self.training, starts)

    def held_out_batch(self, indices: range, count: int) -> torch.Tensor:
        """Sequences `indices` of `count` that are evenly spaced over the held-out stream."""
        last = len(self.held_out) - self.length
        starts = [last * index // max(1, count - 1) for index in indices]
        return self._cut(self.held_out, starts)

    def _cut(self, tokens: np.ndarray, starts: Sequence[int]) -> torch.Tensor:
        rows = np.stack([tokens[start : start + self.length] for start in starts])
        return torch.from_numpy(rows.astype(np.int64))
