"""What a new basis costs: a step that finds one beside a step that does not, and the mean of all.

    python -m benchmarks.refresh --models 1b --ranks 128 --methods recommended galore

With --out FILE.json every round is kept, and the tables in FILE.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from arg_dist.cli.parsing import OneLineParser
from benchmarks.measuring.contenders import LOW_RANK, Matrices, step_of, steps_that_work
from benchmarks.measuring.line import run, run_and_exit, turns_of
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
"""Steps from one basis to the next over which its cost is spread."""

NEW_BASIS = ", new basis"
"""Behind the name of an optimizer: its steps that find one."""


def measure_refreshes(turns: Turns) -> Figures:
    """Times steps with a new basis and steps without one, of one matrix of each shape, in fp32.

    Args:
        turns: of which optimizers, and on what; the first one is held against the others.
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
    """The table of `samples`, which lie one behind the other as they were measured."""
    first = samples[0]["optimizers"][0]
    titles = ["", "a new basis, ms", f"of {first}", f"of {GAP} steps"]
    timed = (
        "A new basis: what a step that finds one takes beyond a step that does not, in the same "
        f"round. The last column: what it adds to {GAP} steps that have none."
    )
    told = [*notes(timed, rounds, samples, left_out), *without_gpu(samples[0]["device"])]
    blocks = [_block(sample, first) for sample in samples]
    return Figures("A new basis", titles, blocks, told, samples)


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
    """Runs the command line; returns the exit code: 0, or 2 if it cannot be used."""
    return run(_options(), _measured, arguments)


def _options() -> OneLineParser:
    command = parser(__doc__)
    add_timed(command, LOW_RANK, ("recommended", "galore"))
    return command


def _measured(options: argparse.Namespace, device: torch.device) -> list[Figures]:
    return [measure_refreshes(turns_of(options, device))]


if __name__ == "__main__":
    run_and_exit(main)
