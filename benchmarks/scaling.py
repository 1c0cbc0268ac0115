"""Scaling of a step's time with the number of layers, and of state with the number of processes.

    python -m benchmarks.scaling --model 60m --processes 1 2 4

Times should grow linearly, and state per process should shrink with the number of processes. Speed
is reported only if each process has a core. With --out FILE.json all figures are saved.
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
from benchmarks.measuring.cli import jobs_of, run, run_and_exit
from benchmarks.measuring.contenders import IN_TRAINING, Matrices, step_of, steps_that_work
from benchmarks.measuring.jobs import Jobs, check_devices
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
"""Multiples of the smallest number of layers."""


def measure_layers(
    model: str, rank: int, names: Sequence[str], *, layers: int, rounds: int, device: torch.device
) -> Figures:
    """Time a step without a refresh on the matrices of 1, 2 and 4 times `layers` layers.

    Args:
        model: a size of ``LLAMA_SIZES`` whose layer shapes are timed.
        rank: rank of the low-rank methods.
        names: the optimizers.
        layers: smallest number of layers.
        rounds: interleaved timed steps of each.
        device: device to run on.
    """
    place, counts = Place(device, torch.float32), [factor * layers for factor in FACTORS]
    samples = []
    for name in names:
        makers = {
            str(n): partial(step_of, name, Matrices(layer_shapes(model, n), place), rank=rank)
            for n in counts
        }
        # one optimizer at a time: all sizes of all optimizers may not fit into memory
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
    """The table of :func:`measure_layers`; adds the fit to the samples."""

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
        heading = f"{name}: {number(1e3 * slope)} ms per layer, fit within {100 * deviation:.1f} %"
        return Block(heading, rows)

    one = samples[0]
    notes = [
        f"Steps without a refresh on the matrices of {one['model']} layers, rank {one['rank']}, "
        f"fp32. {rounds} interleaved rounds; medians, with quartiles in parentheses. A straight "
        "line is fitted to the medians: its slope is the time per layer, and the last column is "
        "the deviation of a median from it.",
        *refusals.of_steps(samples),
        *without_gpu(one["device"]),
    ]
    blocks = [block(sample) for sample in samples]
    titles = ["", "ms", "ms / layers", "off the fit"]
    return Figures("Time of a step by number of layers", titles, blocks, notes, samples)


def fit(layers: Sequence[int], seconds: Sequence[float]) -> tuple[float, list[float]]:
    """The slope of a linear fit, and the ratio of each time to the fitted one."""
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
    """Measure a process's state in training by number of processes, under each engine.

    Args:
        jobs: shared settings.
        engines: engines from ``engines.ENGINES``, without ``none``.
        names: the optimizers.
        processes: numbers of processes; the smallest is the baseline.
        cores: cores of this machine; speed is not reported for more processes than cores.
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
        f"{jobs.model} on {jobs.batch} x {jobs.length} tokens per process, rank {jobs.rank}, fp32. "
        "Largest state: MiB on the process with the most. Relative total: that times the number of "
        "processes, relative to the run with the fewest; 1 is perfect sharding.",
    ]
    if crowded:
        notes.append(
            f"Speed is {NOT_MEASURED} for more processes than cores ({cores}), which would share "
            "them."
        )
    notes += refusals.of_jobs(samples)
    titles = ["", "largest state", "relative total", "ms per training step"]
    found = [Block(f"{engine}, {name}", rows) for (engine, name), rows in blocks.items()]
    return Figures("State by number of processes", titles, found, notes, samples)


def process_median(process: dict[str, Any]) -> float:
    """Median seconds of a process's steps, without the first, which allocates the state."""
    return median(process["seconds"][1:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, or 2 if it is invalid."""
    return run(_options(), _measured, arguments)


def _options() -> OneLineParser:
    command = parser(__doc__)
    add_trained(
        command, IN_TRAINING, ("recommended", "adamw"), engines=("ddp", "zero2"), model="60m"
    )
    add = command.add_argument
    add("--processes", nargs="*", type=at_least(1), default=[1, 2, 4], metavar="N",
        help="numbers of processes (default: 1 2 4)")  # fmt: skip
    add("--layers", type=at_least(1), default=4, metavar="N", help="smallest number of layers; "
        "also timed with twice and four times as many (default: 4)")  # fmt: skip
    add("--rounds", type=at_least(1), default=9, help="timed rounds (default: 9)")
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
