"""The options of the benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from arg_dist.bench.contenders import ADAMW, NAMES, OURS, PEERS
from arg_dist.bench.engines import ENGINES
from arg_dist.bench.overlap import ENGINES as LINKED
from arg_dist.bench.shapes import DTYPES
from arg_dist.lm.command_line import OneLineParser, at_least
from arg_dist.lm.presets import LLAMA_SIZES
from arg_dist.network.bandwidth import bandwidth

RECOMMENDED, GALORE = "recommended", "galore"
LOW_RANK = (*OURS, *PEERS)
IN_TRAINING = (*OURS, "adamw", *PEERS)


def parser(description: str) -> OneLineParser:
    """The command line that `description` tells of."""
    whole = OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(
        dest="command", required=True, metavar="step|refresh|memory|scaling|overlap"
    )
    step = commands.add_parser("step", help="a step without a refresh, beside others and the floor")
    refresh = commands.add_parser("refresh", help="what a new basis costs")
    memory = commands.add_parser("memory", help="what a step takes beyond the model, and under "
                                 "each engine")  # fmt: skip
    scaling = commands.add_parser("scaling", help="time by the number of layers, state by that "
                                  "of processes")  # fmt: skip
    overlap = commands.add_parser("overlap", help="messages that travel while others compute, on "
                                  "links of a bandwidth (Linux, root, iproute2)")  # fmt: skip
    _timed(step, NAMES, NAMES)
    step.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"], metavar="DTYPE",
                      help="of weights and gradients: fp32, bf16 (default: fp32)")  # fmt: skip
    _timed(refresh, LOW_RANK, (RECOMMENDED, GALORE))
    _trained(
        memory, NAMES, (RECOMMENDED, "no-residual", *ADAMW, GALORE), engines=ENGINES, model="nano"
    )
    memory.add_argument("--processes", type=at_least(1), default=2, help="under each engine, but "
                        "for none, which has one (default: 2)")  # fmt: skip
    memory.add_argument("--engine-methods", nargs="*", choices=IN_TRAINING, metavar="METHOD",
                        default=[RECOMMENDED, "adamw", GALORE], help="optimizers under the "
                        "engines (default: recommended adamw galore)")  # fmt: skip
    _trained(scaling, IN_TRAINING, (RECOMMENDED, "adamw"), engines=("ddp", "zero2"), model="60m")
    scaling.add_argument("--processes", nargs="*", type=at_least(1), default=[1, 2, 4],
                         metavar="N", help="(default: 1 2 4)")  # fmt: skip
    scaling.add_argument("--layers", type=at_least(1), default=4, metavar="N", help="the smallest "
                         "number; twice and four times as many follow (default: 4)")  # fmt: skip
    scaling.add_argument("--rounds", type=at_least(1), default=9, help="(default: 9)")
    _linked(overlap)
    return whole


def _linked(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", choices=LLAMA_SIZES, default="60m", metavar="SIZE",
        help=f"of {', '.join(LLAMA_SIZES)} (default: 60m)")  # fmt: skip
    add("--rank", type=at_least(1), help="(default: a quarter of the width)")
    add("--engines", nargs="+", choices=LINKED, default=["fsdp2"], metavar="ENGINE",
        help=f"of {', '.join(LINKED)} (default: fsdp2)")  # fmt: skip
    add(
        "--bandwidths",
        nargs="+",
        type=bandwidth,
        metavar="BITS",
        default=[1e8, 1e9, None],
        help="per second and direction of a host's link (default: 100M 1G unlimited)",
    )
    add("--hosts", type=at_least(2), default=2, help="with a process each (default: 2)")
    add("--rounds", type=at_least(1), default=9, help="(default: 9)")
    add("--limit", type=at_least(1), default=600, metavar="SECONDS", help="for one bandwidth "
        "(default: 600)")  # fmt: skip
    _noted(command)


def _timed(command: argparse.ArgumentParser, able: Sequence[str], methods: Sequence[str]) -> None:
    _shared(command, able, methods)
    add = command.add_argument
    add("--models", nargs="+", choices=LLAMA_SIZES, default=["350m"], metavar="SIZE",
        help=f"whose shapes are taken: {', '.join(LLAMA_SIZES)} (default: 350m)")  # fmt: skip
    add("--ranks", nargs="+", type=at_least(1), default=[128], metavar="RANK",
        help="(default: 128)")  # fmt: skip
    add("--rounds", type=at_least(1), default=9, help="(default: 9)")


def _trained(
    command: argparse.ArgumentParser,
    able: Sequence[str],
    methods: Sequence[str],
    *,
    engines: Sequence[str],
    model: str,
) -> None:
    _shared(command, able, methods)
    known = [name for name in ENGINES if name in engines or name != "none"]
    add = command.add_argument
    add("--model", choices=LLAMA_SIZES, default=model, metavar="SIZE",
        help=f"of {', '.join(LLAMA_SIZES)} (default: {model})")  # fmt: skip
    add("--rank", type=at_least(1), help="of low-rank methods (default: a quarter of the width)")
    add("--engines", nargs="*", choices=known, default=list(engines), metavar="ENGINE",
        help=f"of {', '.join(known)} (default: {' '.join(engines)})")  # fmt: skip
    add("--batch-size", type=at_least(1), default=1, help="sequences of a process (default: 1)")
    add("--seq-len", type=at_least(2), default=256, help="tokens per sequence (default: 256)")
    add("--steps", type=at_least(2), default=5, help="of a training job (default: 5)")
    add("--limit", type=at_least(1), default=600, metavar="SECONDS", help="for one job "
        "(default: 600)")  # fmt: skip


def _shared(command: argparse.ArgumentParser, able: Sequence[str], methods: Sequence[str]) -> None:
    add = command.add_argument
    add("--methods", nargs="+", choices=able, default=list(methods), metavar="METHOD",
        help=f"of {', '.join(able)} (default: {' '.join(methods)})")  # fmt: skip
    add("--device", metavar="DEVICE", help="(default: a GPU if there is one)")
    _noted(command)


def _noted(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--threads", type=at_least(1), help="of torch on the CPU (default: its own choice)")
    add("--out", type=Path, metavar="FILE.json", help="all figures; FILE.md: the tables")
