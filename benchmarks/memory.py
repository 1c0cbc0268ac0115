"""What a step takes beyond the model: alone, and in training under each engine.

    python -m benchmarks.memory --model 60m

The optimizer's state and the most that a step takes beside it, without and with new bases (on CPUs
every allocation of a tensor is followed), beside the peak of a fresh process; then weights,
gradients, state and peak of each process under every engine. Where an optimizer cannot work under
an engine, the table says so, and why. With --out FILE.json all figures are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from arg_dist.cli.parsing import OneLineParser, at_least
from benchmarks.measuring import refusals
from benchmarks.measuring.contenders import ADAMW, IN_TRAINING, NAMES
from benchmarks.measuring.engines import ENGINES
from benchmarks.measuring.jobs import Jobs, check_devices
from benchmarks.measuring.line import jobs_of, run, run_and_exit
from benchmarks.measuring.options import add_trained, parser
from benchmarks.measuring.results import (
    NOT_MEASURED,
    NOT_POSSIBLE,
    Block,
    Figures,
    Row,
    without_gpu,
)


def measure_alone(jobs: Jobs, names: Sequence[str], *, layers: int | None = None) -> Figures:
    """What each optimizer's step takes on the matrices of a model's layers, on one process.

    Args:
        jobs: what is alike; each optimizer has a fresh process.
        names: of the optimizers.
        layers: how many; None for the model's own number.
    """
    samples = []
    for name in names:
        found, why = jobs.run("step_alone", name=name, layers=layers)
        samples.append({"optimizer": name, "reason": why, **(found[0] if found else {})})
    return alone_figures(samples, jobs)


def alone_figures(samples: list[dict[str, Any]], jobs: Jobs) -> Figures:
    """The table of :func:`measure_alone`."""

    def line(sample: dict[str, Any]) -> Row:
        if sample["reason"]:
            return [sample["optimizer"], NOT_POSSIBLE, "", "", ""]
        keys = ("temporary", "temporary_with_new_bases", "peak")
        return [
            sample["optimizer"],
            mib(sample["state"]["storage"]),
            *(mib(sample[key]) for key in keys),
        ]

    what = "resident memory" if jobs.device.type == "cpu" else "memory of the GPU"
    notes = [
        "MiB beyond weights and gradients. The state: all tensors that the optimizer keeps, and "
        "what they keep alive. In a step: tensors at its peak that were not there before; with "
        f"new bases, if all matrices get one in the same step. The peak: {what} of a fresh process "
        "over its first steps, which make the state and the bases.",
        *refusals.of_jobs(samples),
        *without_gpu(jobs.device.type),
    ]
    heading = f"{jobs.model}: the matrices of its layers, rank {jobs.rank}, fp32"
    titles = ["", "state", "in a step", "with new bases", "peak"]
    blocks = [Block(heading, [line(sample) for sample in samples])]
    return Figures("Memory of a step", titles, blocks, notes, samples)


def measure_engines(
    jobs: Jobs, engines: Sequence[str], names: Sequence[str], *, processes: int
) -> Figures:
    """What each process of a training job holds, under each engine.

    Args:
        jobs: what is alike.
        engines: of ``engines.ENGINES``.
        names: of the optimizers.
        processes: how many; under the engine ``none`` there is one.
    """
    samples = [jobs.train(engine, name, processes) for engine in engines for name in names]
    return engine_figures(samples, jobs)


def engine_figures(samples: list[dict[str, Any]], jobs: Jobs) -> Figures:
    """The table of :func:`measure_engines`."""
    engines = list(dict.fromkeys(sample["engine"] for sample in samples))

    def line(sample: dict[str, Any]) -> Row:
        if sample["reason"]:
            return [sample["optimizer"], NOT_POSSIBLE, "", "", ""]
        each = sample["processes"]
        states = [process["state"]["storage"] for process in each]
        return [
            sample["optimizer"],
            *(mib(max(process[key] for process in each)) for key in ("weights", "gradients")),
            mib(max(states)),
            mib(largest([process["peak"] for process in each])),
        ]

    def block(engine: str) -> Block:
        own = [sample for sample in samples if sample["engine"] == engine]
        count = own[0]["number_of_processes"]
        many = "1 process" if count == 1 else f"{count} processes"
        return Block(f"{engine}, {many}", [line(sample) for sample in own])

    what = "resident memory" if jobs.device.type == "cpu" else "memory of the GPU"
    notes = [
        f"{jobs.model} on {jobs.batch} x {jobs.length} tokens a process, rank {jobs.rank}, fp32; "
        "MiB of the process that has most. Weights: all copies, the optimizer's too; gradients: "
        "as the optimizer is handed them, without an engine's buffers; state: tensors and what "
        f"they keep alive. The peak: {what} in training beyond that before the model is built, "
        "activations and buffers included.",
        *refusals.of_jobs(samples),
        *without_gpu(jobs.device.type),
    ]
    titles = ["", "weights", "gradients", "state", "peak"]
    blocks = [block(engine) for engine in engines]
    return Figures("Memory of a process in training", titles, blocks, notes, samples)


def mib(number: float | None) -> str:
    """Bytes in MiB, with two digits behind the point; of None that it was not measured."""
    return NOT_MEASURED if number is None else f"{number / 2**20:.2f}"


def largest(numbers: Sequence[int | None]) -> int | None:
    """The largest of `numbers`; None if one is not known."""
    known = [number for number in numbers if number is not None]
    return max(known) if known and len(known) == len(numbers) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 if it cannot be used."""
    return run(_options(), _measured, arguments)


def _options() -> OneLineParser:
    command = parser(__doc__)
    add_trained(
        command,
        NAMES,
        ("recommended", "no-residual", *ADAMW, "galore"),
        engines=ENGINES,
        model="nano",
    )
    add = command.add_argument
    add("--processes", type=at_least(1), default=2, help="under each engine, but for none, which "
        "has one (default: 2)")  # fmt: skip
    add("--engine-methods", nargs="*", choices=IN_TRAINING, metavar="METHOD",
        default=["recommended", "adamw", "galore"], help="optimizers under the engines "
        "(default: recommended adamw galore)")  # fmt: skip
    return command


def _measured(options: argparse.Namespace, device: torch.device) -> list[Figures]:
    jobs = jobs_of(options, device)
    check_devices(device, options.processes if options.engines else 1)
    tables = [measure_alone(jobs, options.methods)]
    if options.engines and options.engine_methods:
        tables += [
            measure_engines(
                jobs, options.engines, options.engine_methods, processes=options.processes
            )
        ]
    return tables


if __name__ == "__main__":
    run_and_exit(main)
