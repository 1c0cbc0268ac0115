r"""Compares AdaRankGrad with AdamW: learning rates swept alike, then more seeds of the best.

python launchers/finetune_sweep.py --out runs/cola --jobs 2 \
    --adarankgrad-lr 1e-4 2e-4 --adamw-lr 1e-4 2e-4 --seeds 0 1 2 --set max_rank=72 -- \
    --model DIR --task classification --train train.tsv --eval dev.tsv

What stands after -- goes to launchers/finetune.py. A finished run is not repeated, so that a sweep
that was cut off goes on where it stopped. Each run's output is in OUT/RUN.log.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from arg_dist.finetuning.sweep import Trial, best_lr, print_sweep
from arg_dist.lm import InputError
from arg_dist.lm.command_line import FAILED, OneLineParser, at_least, complain

SCRIPT = Path(__file__).with_name("finetune.py")


def parse_options() -> argparse.Namespace:
    """The command line; see --help."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the directory of the runs' directories")
    add("--adarankgrad-lr", nargs="+", default=[], metavar="LR", dest="adarankgrad")
    add("--adamw-lr", nargs="+", default=[], metavar="LR", dest="adamw")
    add("--seeds", nargs="+", type=at_least(0), default=[0, 1, 2], help="the first one is the "
        "sweep's (default: 0 1 2)")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="a setting of AdaRankGrad; may be repeated")  # fmt: skip
    add("--jobs", type=at_least(1), default=1, help="runs at a time (default: 1)")
    add("rest", nargs="+", metavar="OPTION", help="options of launchers/finetune.py, after --")
    options = parser.parse_args()
    if not (options.adarankgrad or options.adamw):
        parser.error("--adarankgrad-lr, --adamw-lr: at least one learning rate is needed")
    return options


def run(trial: Trial, options: argparse.Namespace) -> dict[str, Any]:
    """The report of `trial`, which is run if it has not been.

    Raises:
        InputError: it failed; the message names its log.
    """
    report = trial.report(options.out)
    if report is None:
        directory = trial.directory(options.out)
        own = ["--optimizer", trial.optimizer, "--lr", trial.lr, "--seed", str(trial.seed)]
        if trial.optimizer == "adarankgrad":
            own += [word for setting in options.overrides for word in ("--set", setting)]
        command = [sys.executable, str(SCRIPT), *options.rest, *own, "--out", str(directory)]
        log = directory.with_name(directory.name + ".log")
        print(f"{directory.name}: started", flush=True)
        with open(log, "w") as output:
            subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
        report = trial.report(options.out)
        if report is None:
            raise InputError(f"{directory.name} did not finish; see {log}")
    print(f"{trial.directory(options.out).name}: {report['final_measure']:.4f}", flush=True)
    return report


def run_all(trials: Iterable[Trial], options: argparse.Namespace) -> dict[Trial, dict[str, Any]]:
    """The reports of all `trials`, so many at a time as the user allows."""
    trials = list(trials)
    pool = ThreadPoolExecutor(options.jobs)
    try:
        return dict(zip(trials, pool.map(lambda trial: run(trial, options), trials), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def main() -> int:
    """The sweep, then the seeds, then the table."""
    options = parse_options()
    options.out.mkdir(parents=True, exist_ok=True)
    rates = {name: getattr(options, name) for name in ("adarankgrad", "adamw")}
    sweep, *seeds = options.seeds
    try:
        reports = run_all(
            (Trial(name, lr, sweep) for name, each in rates.items() for lr in each), options
        )
        best = {name: best_lr(reports, name) for name, each in rates.items() if each}
        more = [Trial(name, lr, seed) for name, lr in best.items() for seed in seeds]
        reports |= run_all(more, options)
    except InputError as error:
        complain(str(error))
        return FAILED
    print_sweep(reports)
    return 0


if __name__ == "__main__":
    sys.exit(main())
