"""``bench step``: a step without a refresh, beside other optimizers and beside the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from arg_dist.bench.contenders import NOT_POSSIBLE, OURS, Matrices, step_of, steps_that_work
from arg_dist.bench.floor import copy_seconds_per_byte, moved_bytes, two_products
from arg_dist.bench.results import NOT_MEASURED, Block, Figures, Row, number, with_spread
from arg_dist.bench.shapes import DTYPES, Case, Place, cases, copies, left_out
from arg_dist.bench.timing import Times, in_turns

PRODUCTS, TRAFFIC = "two products", "memory traffic"
"""The two floors: what there is to compute, and what there is to read and to write."""


def measure_steps(
    models: Sequence[str],
    ranks: Sequence[int],
    dtypes: Sequence[str],
    names: Sequence[str],
    *,
    device: torch.device,
    rounds: int,
) -> Figures:
    """Times a step on the matrices of each shape.

    Args:
        models: sizes of Llamas, whose layers' shapes are taken.
        ranks: of the low-rank methods; one that a shape does not have is left out.
        dtypes: of weights and gradients, keys of ``DTYPES``.
        names: of the optimizers, see :data:`arg_dist.bench.contenders.NAMES`.
        device: where.
        rounds: timed steps of each optimizer, in turns.
    """
    per_byte = None if device.type == "cpu" else copy_seconds_per_byte(device)
    samples = [
        _measure(case, Place(device, DTYPES[dtype]), names, rounds, per_byte)
        for dtype in dtypes
        for case in cases(models, ranks)
    ]
    return figures(samples, left_out(models, ranks), rounds)


def _measure(
    case: Case, place: Place, names: Sequence[str], rounds: int, per_byte: float | None
) -> dict[str, Any]:
    """Times of one shape; `per_byte` is seconds per byte read or written, None if not measured."""
    model, shape, rank = case
    count = copies(shape, place.dtype.itemsize)
    together = [replace(shape, count=count)]
    makers = {name: partial(step_of, name, Matrices(together, place), rank=rank) for name in names}
    steps, refused = steps_that_work(makers)
    times = in_turns({PRODUCTS: two_products(shape, rank, count, place), **steps}, rounds)
    traffic = None if per_byte is None else per_byte * moved_bytes(shape, count, place.dtype)
    return {
        "model": model,
        "shape": [shape.rows, shape.columns],
        "in_the_model": shape.count,
        "timed_together": count,
        "rank": rank,
        "dtype": place.dtype_name,
        "device": place.device.type,
        "optimizers": list(names),
        "traffic_seconds": traffic,
        "seconds": {name: taken.as_json() for name, taken in times.items()},
        "not_possible": refused,
    }


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
    notes = [
        f"The floor is {what}. {rounds} rounds in turns; medians, and quartiles in brackets; "
        "ratios are those of a round. No new basis falls into a step. Matrices of a shape are "
        "timed together, as many as fill 64 MiB, at most those of the model.",
        *left_out,
        *reasons(samples),
    ]
    if on_cpu:
        notes.append(f"GPU: {NOT_MEASURED}, and {TRAFFIC} with it.")
    blocks = [_block(sample, floor, first) for sample in samples]
    return Figures("A step without a refresh", titles, blocks, notes, samples)


def reasons(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why some optimizers have no numbers, each reason once."""
    told = (
        f"{name}, {sample.get('dtype', 'fp32')} on {sample['device']}, {NOT_POSSIBLE}: {why}."
        for sample in samples
        for name, why in sample["not_possible"].items()
    )
    return list(dict.fromkeys(told))


def _block(sample: dict[str, Any], floor: str, first: str | None) -> Block:
    count, traffic = sample["timed_together"], sample["traffic_seconds"]
    times = {name: Times(tuple(t["rounds"])) for name, t in sample["seconds"].items()}
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
    matrices = f"{sample['in_the_model']} of {' x '.join(map(str, sample['shape']))}"
    heading = f"{sample['model']}: {matrices}, rank {sample['rank']}, {sample['dtype']}"
    rows = [line(PRODUCTS), [TRAFFIC, known, *rest], *map(line, sample["optimizers"])]
    return Block(heading, rows)
