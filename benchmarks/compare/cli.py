"""Compare AdaRankGrad with other optimizers.

python -m benchmarks.compare pretrain --model pico --steps 400 --seeds 0 1 2 --jobs 2 --out DIR
python -m benchmarks.compare finetune --model DIR --train FILE --eval FILE --jobs 2 --out DIR
python -m benchmarks.compare report DIR

Finished runs are not repeated, and pre-training goes on from its last evaluation: the same command
resumes an interrupted comparison.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from arg_dist.cli.parsing import (
    BAD_INPUT,
    InputError,
    OneLineParser,
    at_least,
    complain,
)
from arg_dist.config import ConfigError
from benchmarks.compare import finetuning_setup, pretraining_setup
from benchmarks.compare.methods import (
    FAMILIES,
    PUBLISHED,
    PUBLISHED_FINETUNING,
    RATES,
    RATES_FINETUNING,
    REST_RATES,
    TWO_OPTIMIZERS,
    choose,
    rates_of,
)
from benchmarks.compare.outcome import write_outcome
from benchmarks.compare.records import Records
from benchmarks.compare.sweep import Sweep
from benchmarks.compare.task import Task
from launchers.pretraining.environment import prepare_environment
from launchers.pretraining.interrupts import exit_code


@dataclass(frozen=True)
class Kind:
    """A kind of training to compare.

    Attributes:
        methods: names of the available methods.
        options: the options of the job.
        prepare: reads them.
        rates: default learning rates of the low-rank matrices, by method.
        rest_rates: those of all other parameters; empty: that of the low-rank matrices.
        published: settings by family.
        peer_rank: default rank of the other low-rank methods.
    """

    methods: tuple[str, ...]
    options: list[tuple[str, dict[str, Any]]]
    prepare: Callable[[argparse.Namespace, Records], Task]
    rates: Mapping[str, Sequence[float]]
    rest_rates: tuple[float, ...]
    published: Mapping[str, dict[str, Any]]
    peer_rank: int | float


KINDS = {
    "pretrain": Kind(
        tuple(name for name in FAMILIES if name not in ("lora", "finetuning")),
        pretraining_setup.TASK_OPTIONS,
        pretraining_setup.prepare_pretraining,
        RATES,
        REST_RATES,
        PUBLISHED,
        0.125,
    ),
    "finetune": Kind(
        tuple(name for name in FAMILIES if name not in TWO_OPTIMIZERS),
        finetuning_setup.TASK_OPTIONS,
        finetuning_setup.prepare_finetuning,
        RATES_FINETUNING,
        (),
        PUBLISHED_FINETUNING,
        8,
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: command-line arguments; None for those of the process.
    """
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(exit_code(number)))
    try:
        prepare_environment(world_of_one=False)
        if options.command == "report":
            write_outcome(options.directory)
        else:
            _compare(options, KINDS[options.command])
        return 0
    except (InputError, ConfigError) as error:
        complain(str(error))
        return BAD_INPUT
    except KeyboardInterrupt:
        return exit_code(signal.SIGINT)


def _compare(options: argparse.Namespace, kind: Kind) -> None:
    methods = choose(
        options.methods,
        peer_rank=options.peer_rank,
        overrides=options.overrides,
        variants=options.variant,
        known=kind.methods,
        published=kind.published,
    )
    own = {name: rates for name, rates in options.rest_lr if name}
    shared = tuple(rate for name, rates in options.rest_lr if not name for rate in rates)
    rest = shared or kind.rest_rates
    rates = rates_of(methods, dict(options.lrs), kind.rates, rest, own)
    records = Records(options.out)
    with records.locked():
        task = kind.prepare(options, records)
        records.begin(
            task.identity,
            methods,
            sweep_seed=options.seeds[0],
            command="python -m benchmarks.compare " + shlex.join(sys.argv[1:]),
            redo=options.redo,
        )
        Sweep(
            records,
            task=task,
            methods=methods,
            rates=rates,
            seeds=list(dict.fromkeys(options.seeds)),
            jobs=options.jobs,
            all_seeds=options.all_seeds,
            kind=options.command,
            tell=partial(print, flush=True),
        ).run()
    write_outcome(options.out)


def parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    whole = OneLineParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, kind in KINDS.items():
        sub = commands.add_parser(name, help=f"compare methods on a {name} job")
        for flag, settings in kind.options:
            sub.add_argument(flag, **settings)
        _add_sweep_options(sub, kind)
    report = commands.add_parser("report", help="rebuild the table and plots from the runs")
    report.add_argument("directory", type=Path, metavar="DIR", help="directory of the comparison")
    return whole


def _add_sweep_options(sub: argparse.ArgumentParser, kind: Kind) -> None:
    add, known = sub.add_argument, kind.methods
    add("--out", type=Path, required=True, help="directory of the comparison")
    add("--methods", nargs="+", default=list(known), metavar="NAME", help="methods to compare: "
        f"{', '.join(known)} (default: all)")  # fmt: skip
    add("--lrs", nargs="+", type=method_rates, default=[], action="extend",
        metavar="METHOD=A,B,...", help="learning rates of a method's low-rank matrices, instead of "
        "its defaults")  # fmt: skip
    add("--rest-lr", nargs="+", type=_rest_rates, default=[], metavar="[METHOD=]RATE",
        help="learning rates of all other parameters (embeddings, output head, norms, biases), for "
        "every method but lora, or as METHOD=A,B,... for one (default: "
        f"{_rest_default(kind)})")  # fmt: skip
    add("--seeds", nargs="+", type=at_least(0), default=[0, 1, 2], help="seeds; learning rates are "
        "compared on the first: --lrs at the middle --rest-lr (the lower of two), --rest-lr at the "
        "best of them, and the best one's neighbours again if another --rest-lr is better; the "
        "best pair also runs on the other seeds (default: 0 1 2)")  # fmt: skip
    add("--all-seeds", action="store_true", help="run all pairs that are tried on all seeds, whose "
        "median decides")  # fmt: skip
    add("--peer-rank", type=_rank, default=kind.peer_rank, metavar="RANK", help="rank of the other "
        "low-rank methods: an integer, or a fraction of a matrix's shorter side (default: "
        f"{kind.peer_rank})")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="an AdaRankGrad setting, for all its methods; may be repeated")  # fmt: skip
    add("--variant", action="append", nargs="+", default=[], metavar=("NAME", "KEY=VALUE"),
        help="an additional method: recommended with other settings, or another method (NAME fira "
        "rank=0.05; NAME adamw betas=[0.9,0.99]; NAME muon momentum=0.95); may be "
        "repeated")  # fmt: skip
    add("--jobs", type=at_least(1), default=1, help="concurrent runs, one thread each (default: 1)")
    add("--redo", nargs="+", default=[], metavar="NAME", help="methods to run again; their runs "
        "with other settings or versions are moved to set_aside.jsonl")  # fmt: skip


def _rest_default(kind: Kind) -> str:
    return " ".join(f"{rate:g}" for rate in kind.rest_rates) or "that of the low-rank matrices"


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return rate


def _rest_rates(text: str) -> tuple[str, tuple[float, ...]]:
    """Rates of one method, or one rate of all, whose name is ""."""
    return method_rates(text) if "=" in text else ("", (_rate(text),))


def method_rates(text: str) -> tuple[str, tuple[float, ...]]:
    """A method and its learning rates, from METHOD=A,B,...

    Raises:
        ArgumentTypeError: it is written otherwise, or a rate is not above 0.
    """
    name, equals, rates = text.partition("=")
    try:
        numbers = tuple(_rate(rate) for rate in rates.split(","))
    except argparse.ArgumentTypeError:
        numbers = ()
    if not (name and equals and numbers):
        raise argparse.ArgumentTypeError(f"expected METHOD=1e-3,2e-3,..., got {text!r}")
    return name, numbers


def _rank(text: str) -> int | float:
    try:
        rank = float(text)
    except ValueError:
        rank = -1.0
    if 0 < rank < 1:
        return rank
    if rank < 1 or rank != int(rank):
        raise argparse.ArgumentTypeError(
            f"expected an integer of at least 1, or a fraction below 1, got {text!r}"
        )
    return int(rank)
