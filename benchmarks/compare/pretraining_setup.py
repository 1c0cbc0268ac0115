"""Shared setup of the runs in a pre-training comparison: options, tokens, identity."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arg_dist.checkpoint.files import write_atomically
from arg_dist.cli.parsing import InputError, at_least, not_negative, share
from arg_dist.planning.llama import model_config
from benchmarks.compare.pretraining import PretrainingJob, read_sequences
from benchmarks.compare.records import Comparison, Records
from benchmarks.compare.task import Task, deciding_versions
from launchers.pretraining.corpus import read_corpus
from launchers.pretraining.identity import model_values, token_digest
from launchers.pretraining.tokens import Sequences, load_tokenizer
from launchers.reporting.measures import LOSS, MEASURES

TASK_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("--model", {"default": "pico", "help": "named size, or path of a model (default: pico)"}),
    ("--data", {"nargs": "+", "default": [], "metavar": "PATH", "help": "text files, "
        "directories, globs, .jsonl, data sets (default: the installed Python source)"}),
    ("--text-key", {"default": "text", "help": "text field of .jsonl files and data sets "
        "(default: text)"}),
    ("--data-bytes", {"type": at_least(1), "help": "maximum amount of data to read"}),
    ("--tokenizer", {"metavar": "DIR", "help": "a Hugging Face tokenizer (default: bytes)"}),
    ("--steps", {"type": at_least(1), "default": 400, "help": "training steps (default: 400)"}),
    ("--batch-size", {"type": at_least(1), "default": 8, "help": "sequences per step (default: "
        "8)"}),
    ("--micro-batch", {"type": at_least(1), "help": "sequences per forward pass (default: the "
        "whole batch)"}),
    ("--seq-len", {"type": at_least(2), "default": 128, "help": "tokens per sequence (default: "
        "128)"}),
    ("--warmup", {"type": at_least(0), "default": 40, "help": "warm-up steps (default: 40)"}),
    ("--min-lr-ratio", {"type": share, "default": 0.1, "help": "final learning rate as a fraction "
        "of the peak (default: 0.1)"}),
    ("--clip", {"type": not_negative, "default": 1.0, "help": "maximum gradient norm (default: "
        "1)"}),
    ("--weight-decay", {"type": not_negative, "default": 0.0, "help": "decoupled weight decay "
        "(default: 0)"}),
    ("--eval-every", {"type": at_least(1), "help": "steps between evaluations (default: an eighth "
        "of --steps)"}),
    ("--eval-sequences", {"type": at_least(1), "default": 128, "help": "held-out sequences per "
        "evaluation (default: 128)"}),
    ("--dtype", {"choices": ("fp32", "bf16"), "default": "fp32", "help": "of the model's products, "
        "by autocast (default: fp32)"}),
    ("--compile", {"action": "store_true", "help": "compile the model; with --dtype bf16 runs of "
        "nano on a CPU take half the time"}),
    ("--device", {"help": "torch device (default: a GPU if available, else cpu)"}),
]  # fmt: skip


def prepare_pretraining(options: argparse.Namespace, records: Records) -> Task:
    """Tokenize the text, or reuse the tokens that the directory's first command stored.

    All runs of a directory therefore see the same tokens, even if the files change meanwhile.

    Raises:
        InputError: the data, the model or a size is invalid.
    """
    micro = options.micro_batch or options.batch_size
    if options.batch_size % micro:
        raise InputError(
            f"--micro-batch {micro}: must divide --batch-size {options.batch_size}; use a divisor"
        )
    source = {key: getattr(options, key) for key in ("data", "text_key", "data_bytes", "tokenizer")}
    folder = records.directory / "tokens"
    sequences = _tokens(options, folder, source, records.comparison())
    config = model_config(options.model, vocab_size=sequences.vocab_size, length=options.seq_len)
    job = PretrainingJob(
        model=options.model,
        vocab_size=sequences.vocab_size,
        steps=options.steps,
        batch_size=options.batch_size,
        micro_batch=micro,
        seq_len=options.seq_len,
        warmup=options.warmup,
        min_lr_ratio=options.min_lr_ratio,
        clip=options.clip,
        weight_decay=options.weight_decay,
        eval_every=options.eval_every or max(1, options.steps // 8),
        eval_sequences=options.eval_sequences,
        device=options.device or _default_device(),
        dtype=options.dtype,
        compile=options.compile,
    )
    identity = {
        "kind": "pretrain",
        "settings": asdict(job),
        "model": model_values(config),
        "text": source | {"vocab_size": sequences.vocab_size, "sha256": token_digest(sequences)},
        "versions": deciding_versions(),
    }
    return Task(asdict(job), str(folder.resolve()), identity, MEASURES[LOSS])


def _tokens(
    options: argparse.Namespace, folder: Path, source: dict[str, Any], earlier: Comparison | None
) -> Sequences:
    known = earlier.job.get("text") if earlier else None
    if known and {key: known[key] for key in source} == source:
        return read_sequences(folder, options.seq_len, known["vocab_size"], seed=0)
    tokenizer = load_tokenizer(options.tokenizer)
    corpus = read_corpus(options.data, text_key=options.text_key, max_bytes=options.data_bytes)
    sequences = Sequences.of(corpus, tokenizer, length=options.seq_len, seed=0)
    if earlier is None:  # keep an earlier command's tokens: the changed identity is refused later
        folder.mkdir(exist_ok=True)
        for part in _PARTS:
            _save(folder / f"{part}.npy", getattr(sequences, part))
    return sequences


_PARTS = ("training", "held_out")


def _save(path: Path, tokens: np.ndarray) -> None:

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # numpy appends a suffix to paths
            np.save(file, tokens)

    write_atomically(path, write)


def _default_device() -> str:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type
