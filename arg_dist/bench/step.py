"""``bench step``: a step without a refresh, beside other optimizers and beside the floor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from arg_dist.bench.contenders import Matrices, step_of
from arg_dist.bench.floor import copy_seconds_per_byte, moved_bytes, two_products
from arg_dist.bench.results import Figures
from arg_dist.bench.shapes import Place, copies, layer_shapes
from arg_dist.bench.timing import in_turns

FLOOR = "floor"


def measure_steps(
    models: Sequence[str],
    ranks: Sequence[int],
    dtypes: Sequence[torch.dtype],
    names: Sequence[str],
    *,
    device: torch.device,
    rounds: int,
) -> Figures:
    """Times a step on the matrices of each shape.

    Args:
        models: sizes of Llamas, whose layers' shapes are taken.
        ranks: of the low-rank methods; one that a shape does not have is left out.
        dtypes: of weights and gradients.
        names: of the optimizers, see :data:`arg_dist.bench.contenders.NAMES`.
        device: where.
        rounds: timed steps of each optimizer, in turns.
    """
    per_byte = None if device.type == "cpu" else copy_seconds_per_byte(device)
    rows, samples = [], []
    for model in models:
        for dtype in dtypes:
            for rank in ranks:
                for shape in layer_shapes(model):
                    if rank >= min(shape.rows, shape.columns):
                        continue
                    count = copies(shape, dtype.itemsize)
                    place = Place(device, dtype)
                    steps = {
                        name: step_of(name, Matrices(shape, count, place), rank=rank)
                        for name in names
                    }
                    steps[FLOOR] = two_products(shape, rank, count, place)
                    times = in_turns(steps, rounds)
                    floor = times[FLOOR]
                    bandwidth = per_byte and per_byte * moved_bytes(shape, count, dtype)
                    samples.append(
                        {
                            "model": model,
                            "shape": [shape.rows, shape.columns],
                            "in_the_model": shape.count,
                            "timed_together": count,
                            "rank": rank,
                            "dtype": _short(dtype),
                            "device": device.type,
                            "bandwidth_floor_seconds": bandwidth,
                            "seconds": {name: taken.seconds for name, taken in times.items()},
                        }
                    )
                    against = floor.median if bandwidth is None else bandwidth
                    ratios = [
                        times[name].over(floor)
                        if bandwidth is None
                        else times[name].median / against
                        for name in names
                    ]
                    rows.append(
                        [
                            f"{model}: {shape}",
                            str(shape.count),
                            f"{rank}, {_short(dtype)}",
                            f"{1e3 * against / count:.2f}",
                            *(f"{ratio:.2f}" for ratio in ratios),
                        ]
                    )
    floor_is = (
        "The floor is the two products G Q and N Q^T, into memory that is there already."
        if per_byte is None
        else "The floor is reading G, and reading and writing W, at the speed of a copy."
    )
    notes = [
        f"{floor_is} Of the optimizers: times the floor, the median of {rounds} rounds in turns; "
        "no new basis falls into a step. Matrices of a shape are timed together, as many as fill "
        "64 MiB, at most those of the model.",
    ]
    titles = ["matrices", "of them", "rank", "floor, ms a matrix", *names]
    return Figures("A step without a refresh", titles, rows, notes, samples)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
