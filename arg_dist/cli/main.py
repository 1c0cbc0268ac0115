"""``arg-dist``: export and inspect checkpoints, plan runs.

Dependencies of a single subcommand (transformers, rich, numpy) are imported when it runs.
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
    """Run the command line.

    Args:
        arguments: command-line arguments; None for those of the process.

    Returns:
        The exit code: 0 on success, 1 if a checkpoint is broken or cannot be exported, 2 if the
        command line is invalid. An unknown or malformed option exits the process with 2.
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
    parser = OneLineParser(
        prog="arg-dist", description="Plan AdaRankGrad runs; export and inspect their checkpoints."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="export|inspect|plan")
    out = commands.add_parser(
        "export", help="write a Hugging Face model directory for from_pretrained"
    )
    either = "a checkpoint directory, or a directory of checkpoints"
    out.add_argument("checkpoint", type=Path, help=f"{either} (exports the newest intact one)")
    out.add_argument("out", type=Path, help="output directory; must be new or empty")
    out.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="float32",
        help="data type of the weights (default: float32)",
    )
    out.add_argument("--tokenizer", metavar="DIR", help="tokenizer to save with the model")
    out.add_argument(
        "--architecture",
        metavar="CLASS",
        help="model class in transformers (default: the class that was trained)",
    )
    out.set_defaults(run=_export)
    look = commands.add_parser("inspect", help="verify checkpoints and list their contents")
    look.add_argument("path", type=Path, help=f"{either} (lists all of them)")
    look.set_defaults(run=_inspect)
    plans = commands.add_parser(
        "plan", help="estimate the memory and communication of a run before starting it"
    )
    plan.add_options(plans)
    plans.set_defaults(run=plan.run)
    return parser
