"""Shared setup of the runs in a fine-tuning comparison: options, files, identity."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arg_dist.cli.parsing import InputError, at_least, not_negative, share
from benchmarks.compare.records import Records
from benchmarks.compare.task import Task, deciding_versions
from launchers.finetuning import tasks
from launchers.finetuning.rows import Columns
from launchers.reporting.measures import MEASURES


@dataclass(frozen=True)
class FinetuningJob:
    """Settings shared by all runs of a comparison."""

    model: str
    train: list[str]
    eval: list[str]
    text_key: str
    label_key: str
    pair_key: str | None
    max_length: int
    epochs: float
    steps: int | None
    batch_size: int
    warmup_ratio: float
    clip: float
    weight_decay: float

    def examples(self) -> tasks.Task:
        """Read the checkpoint and the data.

        Raises:
            InputError: the checkpoint or the data is invalid.
        """
        return tasks.text_classification(
            self.model,
            training=self.train,
            held_out=self.eval,
            columns=Columns(self.text_key, self.label_key, self.pair_key),
            max_length=self.max_length,
        )


TASK_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("--model", {"required": True, "metavar": "DIR", "help": "a Hugging Face checkpoint"}),
    ("--train", {"nargs": "+", "required": True, "metavar": "FILE", "help": ".csv, .tsv, .jsonl"}),
    ("--eval", {"nargs": "+", "required": True, "metavar": "FILE", "help": "held-out files"}),
    ("--text-key", {"default": "text", "metavar": "COLUMN", "help": "text column: header name, "
        "jsonl key, or 1-based number for files without a header (default: text)"}),
    ("--pair-key", {"metavar": "COLUMN", "help": "column of the second text, for pairs"}),
    ("--label-key", {"default": "label", "metavar": "COLUMN", "help": "label column (default: "
        "label)"}),
    ("--max-length", {"type": at_least(2), "default": 128, "metavar": "TOKENS",
        "help": "truncate examples to this length (default: 128)"}),
    ("--epochs", {"type": not_negative, "default": 3.0, "help": "(default: 3)"}),
    ("--steps", {"type": at_least(1), "help": "number of steps; overrides --epochs"}),
    ("--batch-size", {"type": at_least(1), "default": 32, "help": "examples per step (default: "
        "32)"}),
    ("--warmup-ratio", {"type": share, "default": 0.06, "help": "fraction of steps for warm-up, "
        "before linear decay (default: 0.06)"}),
    ("--clip", {"type": not_negative, "default": 1.0, "help": "maximum gradient norm (default: "
        "1)"}),
    ("--weight-decay", {"type": not_negative, "default": 0.0, "help": "decoupled weight decay, "
        "except for norms and biases (default: 0)"}),
]  # fmt: skip


def prepare_finetuning(options: argparse.Namespace, records: Records) -> Task:
    """Check that the checkpoint and the files can be used.

    Raises:
        InputError: they cannot.
    """
    if options.epochs == 0:
        raise InputError("--epochs: expected a number above 0, got 0")
    job = FinetuningJob(
        model=str(Path(options.model).resolve()),
        train=[str(Path(path).resolve()) for path in options.train],
        eval=[str(Path(path).resolve()) for path in options.eval],
        text_key=options.text_key,
        label_key=options.label_key,
        pair_key=options.pair_key,
        max_length=options.max_length,
        epochs=options.epochs,
        steps=options.steps,
        batch_size=options.batch_size,
        warmup_ratio=options.warmup_ratio,
        clip=options.clip,
        weight_decay=options.weight_decay,
    )
    measure = MEASURES[job.examples().measure]
    settings = asdict(job)
    files = {key: settings.pop(key) for key in ("train", "eval")}
    identity = {
        "kind": "finetune",
        "settings": settings | {"model": Path(job.model).name},
        "model": {"sha256": _digest(_files_of(Path(job.model)))},
        "text": {key: _digest([Path(path) for path in paths]) for key, paths in files.items()},
        "versions": deciding_versions(),
    }
    return Task(asdict(job), "", identity, measure)


def _files_of(model: Path) -> list[Path]:
    kept = (".json", ".safetensors", ".bin", ".txt", ".model")
    return sorted(path for path in model.iterdir() if path.suffix in kept and path.is_file())


def _digest(files: list[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
