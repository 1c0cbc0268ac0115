"""Time of a step without a refresh, compared with other optimizers and with a lower bound.

    python -m benchmarks.step --models 350m 1b --ranks 128 --dtypes fp32 bf16

The floor is what no method of this family can avoid: on CPUs the two products G Q and N Q^T, on
GPUs reading G and reading and writing W at copy speed. All timings are interleaved in one process;
ratios are computed per round. With --out FILE.json every round is saved, and the tables in FILE.md.
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
from benchmarks.measuring.contenders import NAMES, OURS, Matrices, step_of, steps_that_work
from benchmarks.measuring.floor import copy_seconds_per_byte, moved_bytes, two_products
from benchmarks.measuring.options import add_timed, parser
from benchmarks.measuring.results import (
    NOT_MEASURED,
    NOT_POSSIBLE,
    Block,
    Figures,
    Row,
    number,
    with_spread,
)
from benchmarks.measuring.shapes import DTYPES, Case, Place, copies
from benchmarks.measuring.timing import in_turns
from benchmarks.measuring.turns import Turns, notes, shape_in, times_in

PRODUCTS, TRAFFIC = "two products", "memory traffic"
"""The two floors: computation, and memory to read and write; the first is a key in JSON."""


def measure_steps(turns: Turns, dtypes: Sequence[str]) -> Figures:
    """Time a step on the matrices of each shape.

    Args:
        turns: the optimizers and shapes.
        dtypes: data types of weights and gradients, keys of ``DTYPES``.
    """
    per_byte = None if turns.device.type == "cpu" else copy_seconds_per_byte(turns.device)
    samples = [
        _measure(turns, case, Place(turns.device, DTYPES[dtype]), per_byte)
        for dtype in dtypes
        for case in turns.cases()
    ]
    return figures(samples, turns.left_out(), turns.rounds)


def _measure(turns: Turns, case: Case, place: Place, per_byte: float | None) -> dict[str, Any]:
    """Time one shape; `per_byte` is seconds per byte read or written, None if not measured."""
    _, shape, rank = case
    count = copies(shape, place.dtype.itemsize)
    together = [replace(shape, count=count)]
    makers = {n: partial(step_of, n, Matrices(together, place), rank=rank) for n in turns.names}
    steps, refused = steps_that_work(makers)
    products = two_products(shape, rank, count, place)
    times = in_turns({PRODUCTS: products, **steps}, turns.rounds)
    traffic = None if per_byte is None else per_byte * moved_bytes(shape, count, place.dtype)
    return turns.sample(
        case,
        place,
        times,
        refused,
        in_the_model=shape.count,
        timed_together=count,
        traffic_seconds=traffic,
    )


def figures(samples: list[dict[str, Any]], left_out: Sequence[str], rounds: int) -> Figures:
    """The table of `samples`, in the order they were measured."""
    on_cpu = all(sample["device"] == "cpu" for sample in samples)
    floor = PRODUCTS if on_cpu else TRAFFIC
    first = next((name for name in samples[0]["optimizers"] if name in OURS), None)
    titles = ["", "ms per matrix", "vs. floor", *([f"vs. {first}"] if first else [])]
    what = {
        PRODUCTS: f"the {PRODUCTS} G Q and N Q^T, into preallocated memory",
        TRAFFIC: f"{TRAFFIC}: reading G and reading and writing W at copy speed",
    }[floor]
    timed = (
        f"The floor is {what}. No step includes a refresh. Matrices of a shape are timed together: "
        "enough to fill 64 MiB, at most as many as the model has. Ratios are computed per round."
    )
    every_note = notes(timed, rounds, samples, left_out)
    if on_cpu:
        every_note.append(f"GPU: {NOT_MEASURED}, nor is {TRAFFIC}.")
    blocks = [_block(sample, floor, first) for sample in samples]
    return Figures("Time of a step without a refresh", titles, blocks, every_note, samples)


def _block(sample: dict[str, Any], floor: str, first: str | None) -> Block:
    count, traffic = sample["timed_together"], sample["traffic_seconds"]
    times = times_in(sample)
    own = times.get(first or "")
    rest = [""] * (1 + bool(first))

    def line(name: str) -> Row:
        if name not in times:
            return [name, NOT_POSSIBLE, *rest]
        taken = times[name]
        milliseconds = with_spread(taken.spread.times(1e3 / count))
        if name == PRODUCTS:
            return [name, milliseconds, *rest]
        ratio = (
            taken.over(times[PRODUCTS]) if floor == PRODUCTS else taken.spread.times(1 / traffic)
        )
        cells = [name, milliseconds, with_spread(ratio)]
        return [*cells, number(taken.over(own).median)] if own else cells

    known = NOT_MEASURED if traffic is None else number(1e3 * traffic / count)
    matrices = f"{sample['in_the_model']} of {shape_in(sample)}"
    heading = f"{sample['model']}: {matrices}, rank {sample['rank']}, {sample['dtype']}"
    rows = [line(PRODUCTS), [TRAFFIC, known, *rest], *map(line, sample["optimizers"])]
    return Block(heading, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, or 2 if it is invalid."""
    return run(_options(), _measured, arguments)


def _options() -> OneLineParser:
    command = parser(__doc__)
    add_timed(command, NAMES, NAMES)
    command.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"], metavar="DTYPE",
                         help="data types of weights and gradients: fp32, bf16 "
                         "(default: fp32)")  # fmt: skip
    return command


def _measured(options: argparse.Namespace, device: torch.device) -> list[Figures]:
    return [measure_steps(turns_of(options, device), options.dtypes)]


if __name__ == "__main__":
    run_and_exit(main)
