"""``arg-dist plan``: what a run would take, before it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from arg_dist.cli.parsing import InputError, at_least, parse_overrides
from arg_dist.config import AdaRankGradConfig, parse_config
from arg_dist.planning.choices import BUCKET, DTYPES, ENGINES, VOCABULARY
from arg_dist.planning.llama import LLAMA_SIZES


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``arg-dist plan``."""
    add = parser.add_argument
    add("--model", required=True, metavar="NAME|PATH",
        help=f"{'|'.join(LLAMA_SIZES)}, or a Hugging Face directory or config.json")  # fmt: skip
    add("--engine", required=True, metavar="ENGINE", help="|".join(ENGINES))
    add("--world-size", type=at_least(1), default=1, metavar="N", help="processes (default: 1)")
    add("--rank", type=_rank, metavar="RANK", help="max_rank: a number, or a fraction of the "
        "shorter side (default: the optimizer's)")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="an optimizer setting, e.g. --set state_budget=2GiB; may be repeated")  # fmt: skip
    add("--dtype", choices=list(DTYPES), default="fp32",
        help="of the weights that the model computes with (default: fp32)")  # fmt: skip
    add("--vocab-size", type=at_least(1), metavar="N",
        help=f"tokens of a model by name (default: {VOCABULARY})")  # fmt: skip
    add("--reduce-bucket-size", type=at_least(1), default=BUCKET, metavar="ELEMENTS",
        help="of DeepSpeed's JSON (default: its own, 500000000)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write all figures there, too")


def run(options: argparse.Namespace) -> int:
    """Prints the plan, and writes it where ``--json`` says; returns the exit code.

    Raises:
        InputError: the file cannot be written, or ``--rank`` is given twice.
        ConfigError: the model, the engine or a setting cannot be used.
    """
    from rich.console import Console

    from arg_dist.planning.figures import make_plan
    from arg_dist.planning.model import load_model
    from arg_dist.planning.table import print_plan

    settings = _settings(options)
    plan = make_plan(
        load_model(options.model, settings, vocab_size=options.vocab_size),
        settings,
        engine=options.engine,
        processes=options.world_size,
        dtype=options.dtype,
        reduce_bucket=options.reduce_bucket_size,
    )
    if options.json is not None:
        try:
            options.json.write_text(json.dumps(plan.as_json(), indent=1) + "\n")
        except OSError as error:
            raise InputError(f"--json {options.json}: {error.strerror}") from None
    print_plan(plan, Console())
    return 0


def _settings(options: argparse.Namespace) -> AdaRankGradConfig:
    settings: dict[str, Any] = parse_overrides(options.overrides)
    if options.rank is not None:
        if "max_rank" in settings:
            raise InputError("--rank: given, and --set max_rank too; leave one out")
        settings["max_rank"] = options.rank
    return parse_config(settings, "--set")


def _rank(text: str) -> int | float:
    """An argparse type: a whole number from 1 on, or a fraction."""
    try:
        rank = json.loads(text)
        if type(rank) in (int, float) and (rank >= 1 if type(rank) is int else 0 < rank < 1):
            return rank
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(
        f"a whole number of at least 1, or a fraction between 0 and 1, is needed, got {text!r}"
    )
