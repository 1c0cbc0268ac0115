"""A step's time by the number of layers, and a process's state by the number of processes.

    python -m benchmarks.scaling --model 60m --processes 1 2 4

Times should grow along a line, and state should fall as the number of processes grows. Speed is
told only where each process has a core. With --out FILE.json all figures are kept.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from statistics import linear_regression, median
from typing import Any

import torch

from arg_dist.cli.parsing import OneLineParser, at_least
from benchmarks.measuring import refusals
from benchmarks.measuring.contenders import IN_TRAINING, Matrices, step_of, steps_that_work
from benchmarks.measuring.jobs import Jobs, check_devices
from benchmarks.measuring.line import jobs_of, run, run_and_exit
from benchmarks.measuring.options import add_trained, parser
from benchmarks.measuring.results import (
    NOT_MEASURED,
    NOT_POSSIBLE,
    Block,
    Figures,
    Row,
    number,
    with_spread,
    without_gpu,
)
from benchmarks.measuring.shapes import Place, layer_shapes
from benchmarks.measuring.timing import Times, in_turns
from benchmarks.memory import mib

FACTORS = (1, 2, 4)
"""Times the smallest number of layers."""


def measure_layers(
    model: str, rank: int, names: Sequence[str], *, layers: int, rounds: int, device: torch.device
) -> Figures:
    """Times a step without a new basis on the matrices of so many layers, twice and four times.

    Args:
        model: a size of ``LLAMA_SIZES``, whose layers' shapes are taken.
        rank: of the low-rank methods.
        names: of the optimizers.
        layers: the smallest number.
        rounds: timed steps of each, in turns.
        device: where.
    """
    place, counts = Place(device, torch.float32), [factor * layers for factor in FACTORS]
    samples = []
    for name in names:
        makers = {
            str(n): partial(step_of, name, Matrices(layer_shapes(model, n), place), rank=rank)
            for n in counts
        }
        # one optimizer after the other: all sizes of all of them may not fit into memory
        steps, refused = steps_that_work(makers, of=name)
        times = in_turns(steps, rounds) if not refused else {}
        samples.append(
            {
                "optimizer": name,
                "model": model,
                "rank": rank,
                "device": device.type,
                "layers": counts,
                "seconds": {count: taken.as_json() for count, taken in times.items()},
                "not_possible": {name: next(iter(refused.values()))} if refused else {},
            }
        )
    return layer_figures(samples, rounds)


def layer_figures(samples: list[dict[str, Any]], rounds: int) -> Figures:
    """The table of :func:`measure_layers`; what it finds out comes to the samples."""

    def block(sample: dict[str, Any]) -> Block:
        name, layers = sample["optimizer"], sample["layers"]
        if sample["not_possible"]:
            return Block(name, [[f"{n} layers", NOT_POSSIBLE, "", ""] for n in layers])
        times = [Times.from_json(sample["seconds"][str(n)]) for n in layers]
        slope, ratios = fit(layers, [taken.median for taken in times])
        deviation = max(abs(ratio - 1) for ratio in ratios)
        sample |= {"seconds_a_layer": slope, "largest_deviation": deviation}
        rows = [
            [
                f"{n} layers",
                with_spread(taken.spread.times(1e3)),
                number(1e3 * taken.median / n),
                f"{100 * (ratio - 1):+.1f} %",
            ]
            for n, taken, ratio in zip(layers, times, ratios, strict=True)
        ]
        heading = f"{name}: {number(1e3 * slope)} ms a layer, within {100 * deviation:.1f} %"
        return Block(heading, rows)

    one = samples[0]
    notes = [
        f"The matrices of layers of {one['model']}, rank {one['rank']}, fp32; no new basis falls "
        f"into a step. {rounds} rounds in turns, medians, and quartiles in brackets. A straight "
        "line is laid through the medians: its slope is the time of a layer, and the last column "
        "how far a median lies from it.",
        *refusals.of_steps(samples),
        *without_gpu(one["device"]),
    ]
    blocks = [block(sample) for sample in samples]
    titles = ["", "ms", "ms, over layers", "off the line"]
    return Figures("A step by the number of layers", titles, blocks, notes, samples)


def fit(layers: Sequence[int], seconds: Sequence[float]) -> tuple[float, list[float]]:
    """The slope of the line through the points, and each of them as a share of the line's."""
    line = linear_regression(layers, seconds)
    fitted = [line.intercept + line.slope * n for n in layers]
    return line.slope, [a / b for a, b in zip(seconds, fitted, strict=True)]


def measure_processes(
    jobs: Jobs,
    engines: Sequence[str],
    names: Sequence[str],
    *,
    processes: Sequence[int],
    cores: int,
) -> Figures:
    """What a process keeps in training with so many of them, under each engine.

    Args:
        jobs: what is alike.
        engines: of ``engines.ENGINES``, without ``none``.
        names: of the optimizers.
        processes: numbers of them; the smallest is what the others are held against.
        cores: of this machine: more processes than that do not show how fast they would be.
    """
    samples = [
        jobs.train(engine, name, count)
        for engine in engines
        for name in names
        for count in sorted(processes)
    ]
    return process_figures(samples, jobs, cores)


def process_figures(samples: list[dict[str, Any]], jobs: Jobs, cores: int) -> Figures:
    """The table of :func:`measure_processes`."""
    blocks: dict[tuple[str, str], list[Row]] = {}
    first: dict[tuple[str, str], int] = {}
    crowded = False
    for sample in samples:
        key, count = (sample["engine"], sample["optimizer"]), sample["number_of_processes"]
        rows = blocks.setdefault(key, [])
        label = "1 process" if count == 1 else f"{count} processes"
        if sample["reason"]:
            rows.append([label, NOT_POSSIBLE, "", ""])
            continue
        most = max(process["state"]["storage"] for process in sample["processes"])
        together = first.setdefault(key, most * count)
        seconds = median(process_median(process) for process in sample["processes"])
        too_many = jobs.device.type == "cpu" and count > cores
        crowded |= too_many
        share = f"{most * count / together:.3f}"
        rows.append([label, mib(most), share, NOT_MEASURED if too_many else number(1e3 * seconds)])
    notes = [
        f"{jobs.model} on {jobs.batch} x {jobs.length} tokens a process, rank {jobs.rank}, fp32. "
        "State of the process that has most, in MiB; then, times the number of processes, of the "
        "state with the fewest: 1 is a perfect share.",
    ]
    if crowded:
        notes.append(
            f"Speed is {NOT_MEASURED} where there are more processes than cores, here {cores}: "
            "they take turns."
        )
    notes += refusals.of_jobs(samples)
    titles = ["", "state, the largest", "times processes", "ms a training step"]
    found = [Block(f"{engine}, {name}", rows) for (engine, name), rows in blocks.items()]
    return Figures("State by the number of processes", titles, found, notes, samples)


def process_median(process: dict[str, Any]) -> float:
    """Seconds of a process's steps after the first, which makes the state."""
    return median(process["seconds"][1:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 if it cannot be used."""
    return run(_options(), _measured, arguments)


def _options() -> OneLineParser:
    command = parser(__doc__)
    add_trained(
        command, IN_TRAINING, ("recommended", "adamw"), engines=("ddp", "zero2"), model="60m"
    )
    add = command.add_argument
    add("--processes", nargs="*", type=at_least(1), default=[1, 2, 4], metavar="N",
        help="(default: 1 2 4)")  # fmt: skip
    add("--layers", type=at_least(1), default=4, metavar="N", help="the smallest number; twice and "
        "four times as many follow (default: 4)")  # fmt: skip
    add("--rounds", type=at_least(1), default=9, help="(default: 9)")
    return command


def _measured(options: argparse.Namespace, device: torch.device) -> list[Figures]:
    jobs = jobs_of(options, device)
    check_devices(device, max(options.processes, default=1))
    tables = [
        measure_layers(
            options.model,
            jobs.rank,
            options.methods,
            layers=options.layers,
            rounds=options.rounds,
            device=device,
        )
    ]
    if options.engines and options.processes:
        tables += [
            measure_processes(
                jobs,
                options.engines,
                options.methods,
                processes=options.processes,
                cores=len(os.sched_getaffinity(0)),
            )
        ]
    return tables


if __name__ == "__main__":
    run_and_exit(main)
