"""``arg-dist``: export and inspect checkpoints, plan runs, write configurations.

Dependencies of a single subcommand (transformers, rich, numpy) are imported when it runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from arg_dist.checkpoint import CheckpointError
from arg_dist.cli import plan
from arg_dist.cli.adapter import export_adapter
from arg_dist.cli.configs import write_configs
from arg_dist.cli.export import DTYPES, export
from arg_dist.cli.inspection import inspect
from arg_dist.cli.parsing import BAD_INPUT, FAILED, InputError, OneLineParser, at_least, complain
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
    if options.adapter is not None:
        return _export_adapter(options)
    if options.rank is not None or options.energy is not None:
        raise InputError("--rank, --energy: of an adapter; give its base model with --adapter")
    done = export(
        options.checkpoint,
        options.out,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        architecture=options.architecture,
    )
    _tell_passed_over(done.passed_over)
    print(
        f"written: {options.out} ({done.architecture}, {done.parameters} parameters, "
        f"{options.dtype}; step {done.step}, {done.checkpoint})"
    )
    return 0


def _tell_passed_over(checkpoints: list[str]) -> None:
    for line in checkpoints:
        complain(f"passed over: {line}")


def _configs(options: argparse.Namespace) -> int:
    for path in write_configs(options.folder):
        print(path)
    return 0


def _export_adapter(options: argparse.Namespace) -> int:
    if options.dtype != "float32" or options.tokenizer is not None:
        raise InputError("--dtype, --tokenizer: of a whole model; leave them out with --adapter")
    done = export_adapter(
        options.checkpoint,
        options.out,
        base=options.adapter,
        rank=options.rank,
        energy=options.energy,
        architecture=options.architecture,
    )
    _tell_passed_over(done.passed_over)
    for name, found in done.factors.items():
        print(f"{name}: rank {found.rank}, relative error {found.error:.2g}")
    for name in done.whole:
        print(f"{name}: saved whole")
    if done.tied:
        print(
            f"{', '.join(done.tied)}: share one weight; use the adapter as it is, for PEFT's "
            "merge_and_unload would add the change to it twice"
        )
    print(f"written: {options.out} (PEFT adapter to {options.adapter}; {done.checkpoint})")
    return 0


def _share(text: str) -> float:
    """An argparse type: a share above 0, up to 1."""
    try:
        if 0 < (share := float(text)) <= 1:
            return share
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 1, got {text!r}")


def _inspect(options: argparse.Namespace) -> int:
    return 0 if inspect(options.path, sys.stdout) else FAILED


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="arg-dist", description="Plan AdaRankGrad runs; export and inspect their checkpoints."
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="configs|export|inspect|plan"
    )
    shipped = commands.add_parser("configs", help="write DeepSpeed configurations to start with")
    shipped.add_argument("folder", type=Path, metavar="DIR", help="where to")
    shipped.set_defaults(run=_configs)
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
    out.add_argument(
        "--adapter",
        type=Path,
        metavar="BASE",
        help="write a PEFT adapter to the model in this directory, with what training has changed",
    )
    out.add_argument("--rank", type=at_least(1), help="rank of the adapter's matrices")
    out.add_argument(
        "--energy", type=_share, help="or the share of each change that it keeps, such as 0.9"
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
