"""``bench refresh``: what a new basis costs, and what is left of that in the mean of all steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from arg_dist.bench.contenders import NOT_POSSIBLE, Matrices, step_of, steps_that_work
from arg_dist.bench.results import NOT_MEASURED, Block, Figures, Row, number, with_spread
from arg_dist.bench.shapes import Case, Place, cases, left_out
from arg_dist.bench.step import reasons
from arg_dist.bench.timing import Times, in_turns

GAP = 200
"""Steps from one basis to the next over which its cost is spread."""

NEW_BASIS = ", new basis"
"""Behind the name of an optimizer: its steps that find one."""


def measure_refreshes(
    models: Sequence[str],
    ranks: Sequence[int],
    names: Sequence[str],
    *,
    device: torch.device,
    rounds: int,
) -> Figures:
    """Times steps with a new basis and steps without one, of one matrix of each shape, in fp32.

    Args:
        models: sizes of Llamas, whose layers' shapes are taken.
        ranks: of the low-rank methods; one that a shape does not have is left out.
        names: of the optimizers; the first one is held against the others.
        device: where.
        rounds: timed steps of each kind, in turns.
    """
    place = Place(device, torch.float32)
    samples = [_measure(case, place, names, rounds) for case in cases(models, ranks)]
    return figures(samples, left_out(models, ranks), rounds)


def _measure(case: Case, place: Place, names: Sequence[str], rounds: int) -> dict[str, Any]:
    model, shape, rank = case
    one = [replace(shape, count=1)]
    steady = {n: partial(step_of, n, Matrices(one, place), rank=rank) for n in names}
    steps, refused = steps_that_work(steady)
    often = {
        n + NEW_BASIS: partial(step_of, n, Matrices(one, place), rank=rank, gap=1) for n in steps
    }
    times = in_turns(steps | {n: make() for n, make in often.items()}, rounds)
    return {
        "model": model,
        "shape": [shape.rows, shape.columns],
        "rank": rank,
        "device": place.device.type,
        "optimizers": list(names),
        "seconds": {name: taken.as_json() for name, taken in times.items()},
        "not_possible": refused,
    }


def figures(samples: list[dict[str, Any]], left_out: Sequence[str], rounds: int) -> Figures:
    """The table of `samples`, which lie one behind the other as they were measured."""
    first = samples[0]["optimizers"][0]
    titles = ["", "a new basis, ms", f"of {first}", f"of {GAP} steps"]
    notes = [
        "A new basis: what a step that finds one takes beyond a step that does not, in the same "
        f"round; {rounds} rounds in turns; medians, and quartiles in brackets. The last column: "
        f"what it adds to {GAP} steps that have none.",
        *left_out,
        *reasons(samples),
    ]
    if all(sample["device"] == "cpu" for sample in samples):
        notes.append(f"GPU: {NOT_MEASURED}.")
    blocks = [_block(sample, first) for sample in samples]
    return Figures("A new basis", titles, blocks, notes, samples)


def _block(sample: dict[str, Any], first: str) -> Block:
    times = {name: Times(tuple(t["rounds"])) for name, t in sample["seconds"].items()}
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

    matrix = " x ".join(map(str, sample["shape"]))
    heading = f"{sample['model']}: {matrix}, rank {sample['rank']}"
    return Block(heading, [line(name) for name in sample["optimizers"]])
