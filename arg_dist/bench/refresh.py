"""``bench refresh``: what a new basis costs, and what is left of that in the mean of all steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from arg_dist.bench.contenders import Matrices, step_of
from arg_dist.bench.results import Figures
from arg_dist.bench.shapes import Place, layer_shapes
from arg_dist.bench.timing import in_turns

GAP = 200
"""Steps from one basis to the next over which its cost is spread."""


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
        ranks: of the low-rank methods.
        names: of the optimizers; the first one is held against the others.
        device: where.
        rounds: timed steps of each kind, in turns.
    """
    place = Place(device, torch.float32)
    rows, samples = [], []
    for model in models:
        for rank in ranks:
            for shape in layer_shapes(model):
                if rank >= min(shape.rows, shape.columns):
                    continue
                steps = {}
                for name in names:
                    steps[name] = step_of(name, Matrices(shape, 1, place), rank=rank)
                    often = Matrices(shape, 1, place)
                    steps[f"{name}, new basis"] = step_of(name, often, rank=rank, gap=1)
                times = in_turns(steps, rounds)
                new = {n: times[f"{n}, new basis"].median - times[n].median for n in names}
                first, others = names[0], names[1:]
                rows.append(
                    [
                        f"{model}: {shape}",
                        str(rank),
                        *(f"{1e3 * new[name]:.1f}" for name in names),
                        *(f"{new[name] / new[first]:.1f}" for name in others),
                        f"{100 * new[first] / GAP / times[first].median:.1f} %",
                    ]
                )
                samples.append(
                    {
                        "model": model,
                        "shape": [shape.rows, shape.columns],
                        "rank": rank,
                        "device": device.type,
                        "seconds": {name: taken.seconds for name, taken in times.items()},
                    }
                )
    notes = [
        "A new basis: the median of steps that find one, less that of steps that do not, "
        f"{rounds} rounds in turns. The last column: its share of a step if one comes every "
        f"{GAP} steps.",
    ]
    titles = ["matrix", "rank", *(f"{name}, ms" for name in names)]
    titles += [*(f"{name} / {names[0]}" for name in names[1:]), f"{names[0]}, spread over {GAP}"]
    return Figures("A new basis", titles, rows, notes, samples)
