"""``bench memory``: what a step takes beyond the model, alone and under each engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from arg_dist.bench import refusals
from arg_dist.bench.contenders import PEERS
from arg_dist.bench.launching import JobError, run_job
from arg_dist.bench.results import NOT_MEASURED, NOT_POSSIBLE, Block, Figures, Row, without_gpu
from arg_dist.lm import InputError

Progress = Callable[[str], None]
"""Is told what was measured, one line at a time."""


@dataclass(frozen=True)
class Jobs:
    """What all jobs of a benchmark have alike.

    Attributes:
        model: a size of ``LLAMA_SIZES``.
        rank: of every low-rank method.
        device: where.
        threads: of torch in each process; None for its own choice.
        limit: seconds that one job may take.
        batch: sequences of a process and step.
        length: of sequences, in tokens.
        steps: of a training job.
        tell: hears of each job that is done.
    """

    model: str
    rank: int
    device: torch.device
    threads: int | None
    limit: float
    batch: int
    length: int
    steps: int
    tell: Progress = print

    def run(
        self, kind: str, *, name: str, processes: int = 1, **more: Any
    ) -> tuple[list[dict[str, Any]], str | None]:
        """Figures by process; or none, and the reason why the package of others cannot do it.

        Raises:
            JobError: the job has failed for another reason.
        """
        job = {"name": name, "model": self.model, "rank": self.rank, "device": str(self.device)}
        try:
            found = run_job(
                kind,
                {**job, **more},
                processes=processes,
                threads=self.threads,
                limit=self.limit,
            )
        except JobError as error:
            if name not in PEERS or error.reason is None:
                raise
            return [], error.reason
        finally:
            told = {"processes": processes, **more}
            self.tell(" ".join([kind, name, *(f"{key}={value}" for key, value in told.items())]))
        return found, None

    def train(self, engine: str, name: str, processes: int) -> dict[str, Any]:
        """A training job as a sample for JSON; of ``none``, with one process."""
        processes = 1 if engine == "none" else processes
        found, why = self.run(
            "training",
            name=name,
            engine=engine,
            processes=processes,
            steps=self.steps,
            batch=self.batch,
            length=self.length,
        )
        sample: dict[str, Any] = {"engine": engine, "optimizer": name, "processes": found}
        return sample | {"number_of_processes": processes, "model": self.model, "reason": why}


def check_devices(device: torch.device, processes: int) -> None:
    """Looks whether each process can have a GPU of its own, where GPUs are asked for.

    Raises:
        InputError: there are too few.
    """
    if device.type == "cpu":
        return
    count = torch.accelerator.device_count()
    if count < processes:
        raise InputError(
            f"--processes {processes}: each needs a GPU, and there is {count}; give --device cpu, "
            "or fewer processes"
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
