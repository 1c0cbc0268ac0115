"""``arg-dist plan``: estimate the memory and communication of a run before starting it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from arg_dist.cli.parsing import InputError, at_least, parse_overrides
from arg_dist.config import AdaRankGradConfig, parse_config
from arg_dist.planning.choices import AGAINST, BUCKET, DTYPES, ENGINES, VOCABULARY
from arg_dist.planning.llama import LLAMA_SIZES


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``arg-dist plan`` to `parser`."""
    add = parser.add_argument
    add("--model", required=True, metavar="NAME|PATH",
        help=f"{'|'.join(LLAMA_SIZES)}, or the path of a Hugging Face directory or "
        "config.json")  # fmt: skip
    add("--engine", required=True, metavar="ENGINE", help="|".join(ENGINES))
    add("--world-size", type=at_least(1), metavar="N",
        help="number of processes (default: 1)")  # fmt: skip
    add("--copies", type=at_least(1), metavar="K", help="copies of the model, each "
        "sharded by fsdp2 over N/K processes; between them, gradients are averaged (HSDP), or go "
        "as sketches with --set gradient_sync=sketch (default: 1)")  # fmt: skip
    add("--mesh", metavar="AXES", help="processes of fsdp2 by axes, of replicate, fsdp and tp "
        "(tensor parallelism), instead of --world-size and --copies: --mesh "
        "fsdp=8,tp=8")  # fmt: skip
    add("--rank", type=_rank, metavar="RANK", help="max_rank: an integer, or a fraction of the "
        "shorter dimension (default: the optimizer's)")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="an optimizer setting, e.g. --set state_budget=2GiB; may be repeated")  # fmt: skip
    add("--dtype", choices=list(DTYPES), default="fp32",
        help="data type of the weights used in forward and backward (default: fp32)")  # fmt: skip
    add("--vocab-size", type=at_least(1), metavar="N",
        help=f"vocabulary size of a named model (default: {VOCABULARY})")  # fmt: skip
    add("--reduce-bucket-size", type=at_least(1), default=BUCKET, metavar="ELEMENTS",
        help="reduce_bucket_size in DeepSpeed's JSON (default: 500000000, as in "
        "DeepSpeed)")  # fmt: skip
    add("--against", nargs="*", choices=AGAINST, default=["adamw", "galore"], metavar="NAME",
        help=f"optimizers to compare with: {', '.join(AGAINST)} (default: adamw "
        "galore)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="also write all figures to this file")


def run(options: argparse.Namespace) -> int:
    """Print the plan, write it to ``--json`` if given, and return the exit code.

    Raises:
        InputError: the file cannot be written, or both ``--rank`` and ``--set max_rank`` are given.
        ConfigError: the model, the engine or a setting is invalid.
    """
    from rich.console import Console

    from arg_dist.planning.figures import make_plan
    from arg_dist.planning.meshes import parse_mesh
    from arg_dist.planning.model import load_model
    from arg_dist.planning.table import print_plan

    settings, mesh = _settings(options), None
    if options.mesh is not None:
        given = {"--world-size": options.world_size, "--copies": options.copies}
        for flag in (flag for flag, value in given.items() if value is not None):
            raise InputError(f"--mesh: conflicts with {flag}, which it decides; leave one out")
        mesh = parse_mesh(options.mesh)
    plan = make_plan(
        load_model(options.model, settings, vocab_size=options.vocab_size),
        settings,
        engine=options.engine,
        processes=options.world_size or 1,
        copies=options.copies or 1,
        mesh=mesh,
        dtype=options.dtype,
        reduce_bucket=options.reduce_bucket_size,
        against=options.against,
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
            raise InputError("--rank: conflicts with --set max_rank; leave one out")
        settings["max_rank"] = options.rank
    return parse_config(settings, "--set")


def _rank(text: str) -> int | float:
    """An argparse type: an integer of at least 1, or a fraction."""
    try:
        rank = json.loads(text)
        if type(rank) in (int, float) and (rank >= 1 if type(rank) is int else 0 < rank < 1):
            return rank
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(
        f"expected an integer of at least 1, or a fraction between 0 and 1, got {text!r}"
    )
