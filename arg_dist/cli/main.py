"""``arg-dist``: exports and inspects checkpoints, and plans runs.

What one subcommand alone needs (transformers, rich, numpy) is imported when it runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from arg_dist.checkpoint import CheckpointError
from arg_dist.cli import plan
from arg_dist.cli.export import DTYPES, export
from arg_dist.cli.inspection import inspect
from arg_dist.cli.parsing import BAD_INPUT, FAILED, InputError, OneLineParser, complain
from arg_dist.config import ConfigError


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: those of the process if None.

    Returns:
        The exit code: 0, 1 if a checkpoint is broken or cannot be exported, 2 if the command line
        cannot be used. A wrong option ends the process with 2.
    """
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except (InputError, ConfigError) as error:
        complain(str(error))
        return BAD_INPUT
    except CheckpointError as error:
        complain(str(error))
        return FAILED
    return code


def _export(options: argparse.Namespace) -> int:
    done = export(
        options.checkpoint,
        options.out,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        architecture=options.architecture,
    )
    for line in done.passed_over:
        complain(f"passed over: {line}")
    print(
        f"written: {options.out} ({done.architecture}, {done.parameters} parameters, "
        f"{options.dtype}; step {done.step}, {done.checkpoint})"
    )
    return 0


def _inspect(options: argparse.Namespace) -> int:
    return 0 if inspect(options.path, sys.stdout) else FAILED


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="arg-dist", description="Plans and checkpoints of AdaRankGrad.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="export|inspect|plan")
    out = commands.add_parser(
        "export", help="write a Hugging Face model directory, for from_pretrained"
    )
    either = "a checkpoint's folder, or a folder of checkpoints"
    out.add_argument("checkpoint", type=Path, help=f"{either}: the newest intact one")
    out.add_argument("out", type=Path, help="the new directory")
    out.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the weights")
    out.add_argument("--tokenizer", metavar="DIR", help="a tokenizer to be put beside the model")
    out.add_argument(
        "--architecture", metavar="CLASS", help="of transformers; default: the one that was trained"
    )
    out.set_defaults(run=_export)
    look = commands.add_parser("inspect", help="verify checkpoints and list their contents")
    look.add_argument("path", type=Path, help=f"{either}: all of them")
    look.set_defaults(run=_inspect)
    plans = commands.add_parser("plan", help="memory and bytes sent of a run, before it starts")
    plan.add_options(plans)
    plans.set_defaults(run=plan.run)
    return parser
