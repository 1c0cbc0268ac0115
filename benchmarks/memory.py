"""Memory of the optimizer: of a single step, and in training under each engine.

    python -m benchmarks.memory --model 60m

Reports the optimizer's state, the peak temporaries of a step without and with a refresh (on CPUs
from a trace of every tensor allocation), and the peak of a fresh process; then weights, gradients,
state and peak of each process under every engine. If an optimizer does not run under an engine, the
table gives the reason. With --out FILE.json all figures are saved.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from arg_dist.cli.parsing import OneLineParser, at_least
from benchmarks.measuring import refusals
from benchmarks.measuring.cli import jobs_of, run, run_and_exit
from benchmarks.measuring.contenders import ADAMW, IN_TRAINING, NAMES
from benchmarks.measuring.engines import ENGINES
from benchmarks.measuring.jobs import Jobs, check_devices
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
    """Measure each optimizer's step on the matrices of a model's layers, in one process.

    Args:
        jobs: shared settings; each optimizer runs in a fresh process.
        names: the optimizers.
        layers: number of layers; None for that of the model.
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
        "MiB in addition to weights and gradients. State: all tensors the optimizer keeps, "
        "including the storages they keep alive. Step: peak tensor memory above that before the "
        "step. Refresh step: the same when all matrices refresh in one step. Peak: "
        f"{what} of a fresh process over its first steps, which allocate the state and refresh.",
        *refusals.of_jobs(samples),
        *without_gpu(jobs.device.type),
    ]
    heading = f"{jobs.model}: matrices of its layers, rank {jobs.rank}, fp32"
    titles = ["", "state", "step", "refresh step", "peak"]
    blocks = [Block(heading, [line(sample) for sample in samples])]
    return Figures("Memory of a step", titles, blocks, notes, samples)


def measure_engines(
    jobs: Jobs, engines: Sequence[str], names: Sequence[str], *, processes: int
) -> Figures:
    """Measure the memory of each process of a training job, under each engine.

    Args:
        jobs: shared settings.
        engines: engines from ``engines.ENGINES``.
        names: the optimizers.
        processes: number of processes; the engine ``none`` uses one.
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
        f"{jobs.model} on {jobs.batch} x {jobs.length} tokens per process, rank {jobs.rank}, fp32; "
        "MiB on the process with the most. Weights: all copies, including the optimizer's. "
        "Gradients: those passed to the optimizer, without the engine's buffers. State: tensors, "
        f"including the storages they keep alive. Peak: {what} in training above that before the "
        "model is built, including activations and buffers.",
        *refusals.of_jobs(samples),
        *without_gpu(jobs.device.type),
    ]
    titles = ["", "weights", "gradients", "state", "peak"]
    blocks = [block(engine) for engine in engines]
    return Figures("Memory of a process in training", titles, blocks, notes, samples)


def mib(number: float | None) -> str:
    """Bytes in MiB with two decimals, or ``not measured`` for None."""
    return NOT_MEASURED if number is None else f"{number / 2**20:.2f}"


def largest(numbers: Sequence[int | None]) -> int | None:
    """The largest of `numbers`; None if any is unknown."""
    known = [number for number in numbers if number is not None]
    return max(known) if known and len(known) == len(numbers) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, or 2 if it is invalid."""
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
    add("--processes", type=at_least(1), default=2, help="number of processes under each engine "
        "except none, which uses one (default: 2)")  # fmt: skip
    add("--engine-methods", nargs="*", choices=IN_TRAINING, metavar="METHOD",
        default=["recommended", "adamw", "galore"], help="optimizers to train under the engines "
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
