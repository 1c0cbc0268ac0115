"""Training jobs and single steps, each in fresh processes, with what all of a benchmark share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from arg_dist.cli.parsing import InputError
from benchmarks.measuring.contenders import PEERS
from benchmarks.measuring.launching import JobError, run_job

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
