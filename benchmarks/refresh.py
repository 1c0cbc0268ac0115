"""Cost of a refresh: a step with one against a step without, and amortized over all steps.

    python -m benchmarks.refresh --models 1b --ranks 128 --methods recommended galore

With --out FILE.json every round is saved, and the tables in FILE.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from arg_dist.cli.parsing import OneLineParser
from benchmarks.measuring.cli import run, run_and_exit, turns_of
from benchmarks.measuring.contenders import LOW_RANK, Matrices, step_of, steps_that_work
from benchmarks.measuring.options import add_timed, parser
from benchmarks.measuring.results import (
    NOT_POSSIBLE,
    Block,
    Figures,
    Row,
    number,
    with_spread,
    without_gpu,
)
from benchmarks.measuring.shapes import Case, Place
from benchmarks.measuring.timing import in_turns
from benchmarks.measuring.turns import Turns, notes, shape_in, times_in

GAP = 200
"""Refresh interval in steps over which the cost is amortized."""

NEW_BASIS = ", new basis"
"""Suffix of an optimizer's name in the JSON samples, for its steps with a refresh."""


def measure_refreshes(turns: Turns) -> Figures:
    """Time steps with and without a refresh on one matrix of each shape, in fp32.

    Args:
        turns: the optimizers and shapes; ratios are relative to the first optimizer.
    """
    samples = [_measure(turns, case) for case in turns.cases()]
    return figures(samples, turns.left_out(), turns.rounds)


def _measure(turns: Turns, case: Case) -> dict[str, Any]:
    _, shape, rank = case
    place, one = Place(turns.device, torch.float32), [replace(shape, count=1)]
    steady = {n: partial(step_of, n, Matrices(one, place), rank=rank) for n in turns.names}
    steps, refused = steps_that_work(steady)
    often = {
        n + NEW_BASIS: partial(step_of, n, Matrices(one, place), rank=rank, gap=1) for n in steps
    }
    times = in_turns(steps | {n: make() for n, make in often.items()}, turns.rounds)
    return turns.sample(case, place, times, refused)


def figures(samples: list[dict[str, Any]], left_out: Sequence[str], rounds: int) -> Figures:
    """The table of `samples`, in the order they were measured."""
    first = samples[0]["optimizers"][0]
    titles = ["", "refresh, ms", f"vs. {first}", f"per {GAP} steps"]
    timed = (
        "Refresh: time of a step with a refresh minus that of a step without, in the same round. "
        f"Last column: that time relative to {GAP} steps without a refresh."
    )
    every_note = [*notes(timed, rounds, samples, left_out), *without_gpu(samples[0]["device"])]
    blocks = [_block(sample, first) for sample in samples]
    return Figures("Cost of a refresh", titles, blocks, every_note, samples)


def _block(sample: dict[str, Any], first: str) -> Block:
    times = times_in(sample)
    new = {
        name: times[name + NEW_BASIS].less(times[name])
        for name in sample["optimizers"]
        if name in times
    }

    def line(name: str) -> Row:
        if name not in new:
            return [name, NOT_POSSIBLE, "", ""]
        own = new.get(first)
        ratio = number(new[name].median / own.median) if own and own.median > 0 else ""
        share = f"{100 * new[name].median / GAP / times[name].median:.1f} %"
        return [name, with_spread(new[name].times(1e3)), ratio, share]

    heading = f"{sample['model']}: {shape_in(sample)}, rank {sample['rank']}"
    return Block(heading, [line(name) for name in sample["optimizers"]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, or 2 if it is invalid."""
    return run(_options(), _measured, arguments)


def _options() -> OneLineParser:
    command = parser(__doc__)
    add_timed(command, LOW_RANK, ("recommended", "galore"))
    return command


def _measured(options: argparse.Namespace, device: torch.device) -> list[Figures]:
    return [measure_refreshes(turns_of(options, device))]


if __name__ == "__main__":
    run_and_exit(main)
