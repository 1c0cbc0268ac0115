"""``arg-dist``: exports checkpoints, looks through them, and plans runs."""

from __future__ import annotations

import sys
from pathlib import Path

from arg_dist.checkpoint import CheckpointError
from arg_dist.command.export import DTYPES, export
from arg_dist.command.inspection import inspect
from arg_dist.command.plan import add_options, plan
from arg_dist.lm import InputError
from arg_dist.lm.command_line import BAD_INPUT, FAILED, OneLineParser, complain


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
        if options.command == "inspect":
            return 0 if inspect(options.path, sys.stdout) else FAILED
        if options.command == "plan":
            plan(options)
            return 0
        done = export(
            options.checkpoint,
            options.out,
            dtype=options.dtype,
            tokenizer=options.tokenizer,
            architecture=options.architecture,
        )
    except (CheckpointError, InputError) as error:
        complain(str(error))
        return BAD_INPUT if isinstance(error, InputError) else FAILED
    for line in done.passed_over:
        complain(f"passed over: {line}")
    print(
        f"written: {options.out} ({done.architecture}, {done.parameters} parameters, "
        f"{options.dtype}; step {done.step}, {done.checkpoint})"
    )
    return 0


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
    look = commands.add_parser("inspect", help="verify checkpoints, and tell what is in them")
    look.add_argument("path", type=Path, help=f"{either}: all of them")
    add_options(commands.add_parser("plan", help="tell what a run would take, before it"))
    return parser
