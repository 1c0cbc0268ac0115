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

from arg_dist.bench.contenders import NAMES, OURS, PEERS
from arg_dist.bench.refresh import measure_refreshes
from arg_dist.bench.results import Figures, check_out, show, write
from arg_dist.bench.shapes import DTYPES, check_ranks
from arg_dist.bench.step import measure_steps
from arg_dist.compare import peers
from arg_dist.compare.methods import FAMILIES
from arg_dist.lm import InputError
from arg_dist.lm.command_line import BAD_INPUT, OneLineParser, at_least, complain
from arg_dist.lm.environment import prepare_environment
from arg_dist.lm.presets import LLAMA_SIZES


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 if it cannot be used."""
    prepare_environment(world_of_one=False)
    options = _parser().parse_args(arguments)
    try:
        tables = _run(options)
    except InputError as error:
        complain(str(error))
        return BAD_INPUT
    show(tables)
    if options.out is not None:
        write(tables, options.out)
    return 0


def _run(options: argparse.Namespace) -> list[Figures]:
    device = _device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.out is not None:
        check_out(options.out)
    peers.require({FAMILIES.get(name, name) for name in options.methods})
    check_ranks(options.models, options.ranks)
    where = {"device": device, "rounds": options.rounds}
    if options.command == "step":
        measured = measure_steps(
            options.models, options.ranks, options.dtypes, options.methods, **where
        )
    else:
        measured = measure_refreshes(options.models, options.ranks, options.methods, **where)
    return [measured]


def _device(name: str | None) -> torch.device:
    """The device of this name, or the best one.

    Raises:
        InputError: there is no such device here.
    """
    best = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return best or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {"cpu", best.type if best else "cpu"}:
        there = f"{best.type} and cpu" if best else "cpu alone"
        raise InputError(f"--device {name}: there is no such device here; there is {there}")
    return device


def _parser() -> OneLineParser:
    assert __doc__ is not None
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="step|refresh")
    step = commands.add_parser("step", help="a step without a refresh, beside others and the floor")
    refresh = commands.add_parser("refresh", help="what a new basis costs")
    _add_shared(step, NAMES, NAMES)
    _add_shared(refresh, (*OURS, *PEERS), (next(iter(OURS)), "galore"))
    for command in (step, refresh):
        add = command.add_argument
        add("--models", nargs="+", choices=LLAMA_SIZES, default=["350m"], metavar="SIZE",
            help=f"whose shapes are taken: {', '.join(LLAMA_SIZES)} (default: 350m)")  # fmt: skip
        add("--ranks", nargs="+", type=at_least(1), default=[128], metavar="RANK",
            help="(default: 128)")  # fmt: skip
        add("--rounds", type=at_least(1), default=9, help="(default: 9)")
    step.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"], metavar="DTYPE",
                      help="of weights and gradients: fp32, bf16 (default: fp32)")  # fmt: skip
    return parser


def _add_shared(
    command: argparse.ArgumentParser, able: Sequence[str], methods: Sequence[str]
) -> None:
    add = command.add_argument
    add("--methods", nargs="+", choices=able, default=list(methods), metavar="METHOD",
        help=f"of {', '.join(able)} (default: {' '.join(methods)})")  # fmt: skip
    add("--threads", type=at_least(1), help="of torch on the CPU (default: its own choice)")
    add("--device", metavar="DEVICE", help="(default: a GPU if there is one)")
    add("--out", type=Path, metavar="FILE.json", help="all figures; FILE.md: the tables")
