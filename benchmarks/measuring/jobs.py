"""Run training jobs and single steps in fresh processes, with the settings of a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from arg_dist.cli.parsing import InputError
from benchmarks.measuring.contenders import PEERS
from benchmarks.measuring.launching import JobError, run_job

Progress = Callable[[str], None]
"""Receives progress messages, one line at a time."""


@dataclass(frozen=True)
class Jobs:
    """Settings shared by all jobs of a benchmark.

    Attributes:
        model: a size of ``LLAMA_SIZES``.
        rank: rank of every low-rank method.
        device: device to run on.
        threads: torch threads per process; None for torch's default.
        limit: time limit of one job in seconds.
        batch: sequences per process and step.
        length: sequence length in tokens.
        steps: steps of a training job.
        tell: called when a job is done.
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
        """Run a job: its figures by process, or an empty list and why a peer cannot run it.

        Raises:
            JobError: the job failed for any other reason.
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
            shown = {"processes": processes, **more}
            self.tell(" ".join([kind, name, *(f"{key}={value}" for key, value in shown.items())]))
        return found, None

    def train(self, engine: str, name: str, processes: int) -> dict[str, Any]:
        """Run a training job and return it as a JSON sample; ``none`` uses one process."""
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
    """Check that there is one GPU per process, if GPUs are requested.

    Raises:
        InputError: there are too few.
    """
    if device.type == "cpu":
        return
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if count < processes:
        raise InputError(
            f"--processes {processes}: each process needs a GPU, found {count}; use --device cpu "
            "or fewer processes"
        )
