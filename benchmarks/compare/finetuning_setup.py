"""What the runs of a fine-tuning comparison share: options, files, identity."""

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
    """All that the runs of a comparison have in common."""

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
        """Reads checkpoint and data.

        Raises:
            InputError: they cannot be used.
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
    ("--text-key", {"default": "text", "metavar": "COLUMN", "help": "header name or jsonl key; a "
        "number, from 1, for files without a header (default: text)"}),
    ("--pair-key", {"metavar": "COLUMN", "help": "of a second text, for pairs"}),
    ("--label-key", {"default": "label", "metavar": "COLUMN", "help": "(default: label)"}),
    ("--max-length", {"type": at_least(2), "default": 128, "metavar": "TOKENS"}),
    ("--epochs", {"type": not_negative, "default": 3.0, "help": "(default: 3)"}),
    ("--steps", {"type": at_least(1), "help": "instead of --epochs"}),
    ("--batch-size", {"type": at_least(1), "default": 32, "help": "examples (default: 32)"}),
    ("--warmup-ratio", {"type": share, "default": 0.06, "help": "share of the steps until the "
        "peak, from which the rate falls linearly (default: 0.06)"}),
    ("--clip", {"type": not_negative, "default": 1.0, "help": "the gradient's largest norm"}),
    ("--weight-decay", {"type": not_negative, "default": 0.0, "help": "not of norms and biases"}),
]  # fmt: skip


def prepare_finetuning(options: argparse.Namespace, records: Records) -> Task:
    """Looks whether checkpoint and files can be used.

    Raises:
        InputError: they cannot.
    """
    if options.epochs == 0:
        raise InputError("--epochs: a number above 0 is needed, got 0")
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
