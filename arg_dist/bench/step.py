"""``bench step``: a step without a refresh, beside other optimizers and beside the floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from arg_dist.bench.contenders import OURS, Matrices, step_of, steps_that_work
from arg_dist.bench.floor import copy_seconds_per_byte, moved_bytes, two_products
from arg_dist.bench.results import (
    NOT_MEASURED,
    NOT_POSSIBLE,
    Block,
    Figures,
    Row,
    number,
    with_spread,
)
from arg_dist.bench.shapes import DTYPES, Case, Place, copies
from arg_dist.bench.timing import in_turns
from arg_dist.bench.turns import Turns, notes, shape_in, times_in

PRODUCTS, TRAFFIC = "two products", "memory traffic"
"""The two floors: what there is to compute, and what there is to read and to write."""


def measure_steps(turns: Turns, dtypes: Sequence[str]) -> Figures:
    """Times a step on the matrices of each shape.

    Args:
        turns: of which optimizers, and on what.
        dtypes: of weights and gradients, keys of ``DTYPES``.
    """
    per_byte = None if turns.device.type == "cpu" else copy_seconds_per_byte(turns.device)
    samples = [
        _measure(turns, case, Place(turns.device, DTYPES[dtype]), per_byte)
        for dtype in dtypes
        for case in turns.cases()
    ]
    return figures(samples, turns.left_out(), turns.rounds)


def _measure(turns: Turns, case: Case, place: Place, per_byte: float | None) -> dict[str, Any]:
    """Times of one shape; `per_byte` is seconds per byte read or written, None if not measured."""
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
    """The table of `samples`, which lie one behind the other as they were measured."""
    on_cpu = all(sample["device"] == "cpu" for sample in samples)
    floor = PRODUCTS if on_cpu else TRAFFIC
    first = next((name for name in samples[0]["optimizers"] if name in OURS), None)
    titles = ["", "ms a matrix", "of the floor", *([f"of {first}"] if first else [])]
    what = {
        PRODUCTS: f"{PRODUCTS}, G Q and N Q^T, into memory that is there already",
        TRAFFIC: f"{TRAFFIC}: reading G, and reading and writing W, at the speed of a copy",
    }[floor]
    timed = (
        f"The floor is {what}. No new basis falls into a step. Matrices of a shape are timed "
        "together, as many as fill 64 MiB, at most those of the model. Ratios are those of a round."
    )
    told = notes(timed, rounds, samples, left_out)
    if on_cpu:
        told.append(f"GPU: {NOT_MEASURED}, and {TRAFFIC} with it.")
    blocks = [_block(sample, floor, first) for sample in samples]
    return Figures("A step without a refresh", titles, blocks, told, samples)


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
