"""A checkpoint written under one engine is gone on from under any other, by any processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

import arg_dist
from tests.launch import models, torch_engines
from tests.launch.training import Run, check, ranks_now
from tests.tolerances import LOSSES


class Job:
    """Training under one of the engines, on batches that depend on the step alone."""

    def __init__(self, group: dist.ProcessGroup, engine: str, name: str) -> None:
        self.group = group
        self.training = getattr(torch_engines, engine).start(group, name)
        self.optimizer = self.training.optimizer
        self.model = getattr(self.training.model, "module", self.training.model)

    def train(self, first: int, last: int) -> Run:
        """Mean losses over all processes, and ranks, at each step."""
        processes, me = dist.get_world_size(self.group), dist.get_rank(self.group)
        share = models.BATCH // processes
        losses, ranks = [], []
        for step in range(first, last):
            tokens = models.batch(step)[me * share : (me + 1) * share]
            loss = self.training.micro_step(tokens, 1.0, last=True).detach()
            dist.all_reduce(loss, group=self.group)
            losses.append(loss.item() / processes)
            ranks.append(ranks_now(self.optimizer))
        return {"losses": losses, "ranks": ranks}

    def save(self, folder: Path, step: int) -> None:
        arg_dist.checkpoint.save(folder, self.optimizer, model=self.model, step=step)

    def load(self, folder: Path) -> arg_dist.checkpoint.Restored:
        return arg_dist.checkpoint.load(folder, self.optimizer, model=self.model)


def straight(group: dist.ProcessGroup, engine: str, name: str, folder: Path) -> Run:
    job = Job(group, engine, name)
    job.train(0, 8)
    job.save(folder, 8)
    return job.train(8, 28)


def resumed(group: dist.ProcessGroup, engine: str, name: str, folder: Path) -> Run:
    job = Job(group, engine, name)
    restored = job.load(folder)
    assert restored.step == 8
    return job.train(8, 28)


@pytest.mark.parametrize(
    ("processes", "name", "engine"),
    [
        (1, "llama", "DDP"),
        (3, "odd", "DDP"),
        (4, "odd", "ROWS"),
        (2, "llama", "COLUMNS"),
        (4, "llama", "HSDP"),
    ],
)
def test_with_as_many_processes_a_run_goes_on_to_the_bit(pool, tmp_path, processes, name, engine):
    folder = tmp_path / "checkpoint"
    expected = pool.run(straight, processes, engine, name, folder, seconds=60)
    assert pool.run(resumed, processes, engine, name, folder, seconds=60) == expected


@pytest.mark.parametrize("name", ["llama", "odd"])
def test_a_run_goes_on_under_other_engines_on_other_numbers_of_processes(pool, tmp_path, name):
    ways = [(3, "ROWS"), (2, "DDP"), (4, "COLUMNS"), (4, "HSDP"), (1, "DDP")]
    first = tmp_path / "first"
    [alone] = pool.run(straight, 1, "DDP", name, first, seconds=60)
    for processes, engine in ways:
        check(pool.run(resumed, processes, engine, name, first, seconds=60), alone, LOSSES)
