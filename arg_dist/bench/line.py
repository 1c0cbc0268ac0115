"""The command line of benchmarks.

python -m arg_dist.bench step --models 350m --ranks 128
python -m arg_dist.bench refresh --models 1b --ranks 128 --methods recommended galore

The same commands run on CPUs and on GPUs. --threads is torch's own choice unless given.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from arg_dist.bench.contenders import NAMES, OURS, PEERS
from arg_dist.bench.refresh import measure_refreshes
from arg_dist.bench.step import measure_steps
from arg_dist.compare import peers
from arg_dist.compare.methods import FAMILIES
from arg_dist.lm import InputError
from arg_dist.lm.command_line import BAD_INPUT, OneLineParser, at_least, complain
from arg_dist.lm.environment import prepare_environment
from arg_dist.lm.presets import LLAMA_SIZES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 if it cannot be used."""
    prepare_environment(world_of_one=False)
    options = _parser().parse_args(arguments)
    device = torch.device(options.device or _best_device())
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        peers.require({FAMILIES.get(name, name) for name in options.methods})
    except InputError as error:
        complain(str(error))
        return BAD_INPUT
    if options.command == "step":
        figures = measure_steps(
            options.models,
            options.ranks,
            [DTYPES[name] for name in options.dtypes],
            options.methods,
            device=device,
            rounds=options.rounds,
        )
    else:
        figures = measure_refreshes(
            options.models, options.ranks, options.methods, device=device, rounds=options.rounds
        )
    figures.show(Console())
    if options.out is not None:
        figures.write(options.out)
    return 0


def _best_device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _parser() -> OneLineParser:
    assert __doc__ is not None
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="step|refresh")
    step = commands.add_parser("step", help="a step without a refresh, beside others and the floor")
    refresh = commands.add_parser("refresh", help="what a new basis costs")
    for command, methods in ((step, NAMES), (refresh, (next(iter(OURS)), "galore"))):
        able = NAMES if command is step else (*OURS, *PEERS)
        add = command.add_argument
        add("--models", nargs="+", choices=LLAMA_SIZES, default=["350m"], metavar="SIZE",
            help=f"whose shapes are taken: {', '.join(LLAMA_SIZES)} (default: 350m)")  # fmt: skip
        add("--ranks", nargs="+", type=at_least(1), default=[128], metavar="RANK",
            help="(default: 128)")  # fmt: skip
        add("--methods", nargs="+", choices=able, default=list(methods), metavar="METHOD",
            help=f"of {', '.join(able)} (default: {' '.join(methods)})")  # fmt: skip
        add("--rounds", type=at_least(1), default=9, help="(default: 9)")
        add("--threads", type=at_least(1), help="of torch on the CPU (default: its own choice)")
        add("--device", metavar="DEVICE", help="(default: a GPU if there is one)")
        add("--out", type=Path, metavar="FILE.json", help="all figures; FILE.md: the table")
    step.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"], metavar="DTYPE",
                      help="of weights and gradients: fp32, bf16 (default: fp32)")  # fmt: skip
    return parser
