"""Command line of the pre-training job."""

from __future__ import annotations

import argparse
from pathlib import Path

from arg_dist.cli.parsing import OneLineParser, at_least, not_negative, share
from launchers.pretraining.job_config import OPTIMIZERS
from launchers.pretraining.resuming import KEEP


def parse_options(description: str) -> argparse.Namespace:
    """Parses the command line; `description` is the text of --help."""
    parser = OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--deepspeed_config", metavar="JSON", help="train under DeepSpeed with this configuration "
        "(default: the launcher's engine)")  # fmt: skip
    add("--model", default="nano", help="pico|nano|60m|130m|350m|1b|7b|13b|70b, a config.json or "
        "a checkpoint")  # fmt: skip
    add("--data", nargs="+", default=[], metavar="PATH", help="text files, directories, globs, "
        ".jsonl, a saved data set (default: the installed Python source)")  # fmt: skip
    add("--text-key", default="text", help="key of the text in .jsonl files and data sets")
    add("--data-bytes", type=at_least(1), help="maximum bytes of text to read (default without "
        "--data: 32 MiB)")  # fmt: skip
    add("--tokenizer", metavar="DIR", help="a Hugging Face tokenizer (default: bytes)")
    add("--optimizer", choices=OPTIMIZERS, help="default: the JSON's, or adarankgrad")
    add("--lr", type=float, help="peak learning rate (default: the JSON's, or 1e-3)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="an optimizer setting, e.g. --set energy=0.8; repeatable")  # fmt: skip
    add("--batch-size", type=at_least(1), help="sequences per step over all processes "
        "(default: the JSON's train_batch_size, or 16)")  # fmt: skip
    add("--accumulation", type=at_least(1), help="gradient accumulation steps (default: the "
        "JSON's, or 1)")  # fmt: skip
    add("--clip", type=not_negative, help="maximum gradient norm, 0 for no clipping (default: "
        "the JSON's gradient_clipping, or 1)")  # fmt: skip
    add("--seq-len", type=at_least(2), default=128, help="tokens per sequence")
    add("--steps", type=at_least(1), default=300, help="optimizer steps")
    add("--warmup", type=at_least(0), default=20, help="steps until the peak learning rate")
    add("--min-lr-ratio", type=share, default=0.1, help="final learning rate / peak learning rate")
    add("--seed", type=at_least(0), default=0)
    add("--eval-every", type=at_least(1), default=50, metavar="STEPS")
    add("--eval-batches", type=at_least(1), default=4, help="global batches per evaluation")
    add("--log-ranks-every", type=at_least(1), default=10, metavar="STEPS")
    add("--save-every", type=at_least(1), metavar="STEPS", help="save checkpoints in "
        "OUT/checkpoints, also at the end and when stopped (with --resume: only then)")  # fmt: skip
    add("--keep", type=at_least(1), metavar="K", help=f"checkpoints to keep (default: {KEEP})")
    add("--resume", metavar="auto|PATH", help="resume from the newest intact checkpoint in OUT, "
        "or start anew if there is none; or from the checkpoint PATH, of any run")  # fmt: skip
    add("--time-limit", type=at_least(1), metavar="SECONDS", help="how long a process waits for "
        "another one that has stopped responding, in training and while a checkpoint is written "
        "(default: the engine's, 10 to 30 minutes; before training at least 30)")  # fmt: skip
    add("--out", type=Path, help="the run's directory (default: runs/MODEL-OPTIMIZER)")
    add("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args()
