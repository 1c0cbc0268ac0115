"""DDP's ``join()``: processes that have run out of batches take part in the others' steps."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from matrices import gaussian
from tolerances import REDUCTION_ORDER_WEIGHTS
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import arg_dist
from arg_dist import AdaRankGrad

SETTINGS = {
    "lr": 1e-2,
    "max_rank": 4,
    "min_rank": 2,
    "min_gap": 2,
    "max_gap": 4,
    "collective_timeout": 15,
}
BATCHES = 4
"""Of the process that has the fewest."""
Weights = list[torch.Tensor]


class Job:
    """A model under DDP, of which process i has `2 i` batches more than process 0."""

    def __init__(self, group: Any, how: str, *, shared: bool = True, ddp: bool = True) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
        self.how, self.me, self.size = how, dist.get_rank(group), dist.get_world_size(group)
        views = "views" in how
        self.model: Any = self.net
        if ddp:
            self.model = DistributedDataParallel(
                self.net, process_group=group, gradient_as_bucket_view=views
            )
        self.optimizer = AdaRankGrad(
            arg_dist.param_groups(self.net), process_group=group if shared else None, **SETTINGS
        )

    def context(self) -> Any:
        if "Join" in self.how:
            order = [self.model, self.optimizer]
            return Join(order[::-1] if "reversed" in self.how else order)
        return self.model.join()

    def count(self, process: int) -> int:
        return BATCHES + 2 * process

    def loss(self, epoch: int, batch: int, process: int) -> torch.Tensor:
        x = gaussian(4, 16, seed=1000 * epoch + 10 * batch + process)
        return self.model(x).sub(x.flip(1)).square().mean()

    def epoch(self, epoch: int) -> None:
        every = 2 if "accumulated" in self.how else 1
        with self.context():
            for batch in range(self.count(self.me)):
                last = (batch + 1) % every == 0
                waits = not last and "no_sync" in self.how
                with self.model.no_sync() if waits else nullcontext():
                    self.loss(epoch, batch, self.me).backward()
                if last:
                    self.optimizer.step()
                    self.optimizer.zero_grad(set_to_none="zeros" not in self.how)

    def epoch_alone(self, epoch: int) -> None:
        """The same steps by one process that has the batches of all."""
        for batch in range(self.count(self.size - 1)):
            for process in range(self.size):
                if batch < self.count(process):
                    (self.loss(epoch, batch, process) / self.size).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def joined(group: Any, how: str) -> tuple[int, Weights]:
    job = Job(group, how)
    for epoch in range(2):
        job.epoch(epoch)
    with job.model.join(enable=False):
        job.loss(2, 0, job.me).backward()
        job.optimizer.step()
    return job.optimizer.calls, [parameter.detach() for parameter in job.net.parameters()]


def alone(group: Any, how: str) -> Weights:
    job = Job(group, how, shared=False, ddp=False)
    for epoch in range(2):
        job.epoch_alone(epoch)
    for process in range(job.size):
        (job.loss(2, 0, process) / job.size).backward()
    job.optimizer.step()
    return [parameter.detach() for parameter in job.net.parameters()]


PLAIN = ["join", "Join", "Join reversed", "join views zeros"]


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("how", PLAIN)
def test_uneven_inputs_train_as_one_process_does(pool, how, processes):
    expected = pool.run(alone, processes, how)[0]
    results = pool.run(joined, processes, how)
    for calls, weights in results:
        assert calls == 2 * (BATCHES + 2 * (processes - 1)) + 1
        assert all(map(torch.equal, weights, results[0][1]))
        for ours, theirs in zip(weights, expected, strict=True):
            REDUCTION_ORDER_WEIGHTS.check(ours, theirs)


@pytest.mark.parametrize("how", ["join accumulated", "join accumulated no_sync"])
def test_a_step_of_several_micro_batches_comes_to_those_who_have_none(pool, how):
    results = pool.run(joined, 2, how)
    for calls, weights in results:
        assert calls == 2 * (BATCHES + 2) // 2 + 1
        assert all(map(torch.equal, weights, results[0][1]))


def two_models(group: Any) -> list[Weights]:
    """A GAN in one context: its optimizers step in turn."""
    jobs = [Job(group, "join"), Job(group, "join")]
    models = [job.model for job in jobs]
    with Join(models):
        for batch in range(jobs[0].count(jobs[0].me)):
            for job in jobs:
                job.optimizer.zero_grad()
                job.loss(0, batch, job.me).backward()
            jobs[1].optimizer.step()
            jobs[0].optimizer.step()
    return [[parameter.detach() for parameter in job.net.parameters()] for job in jobs]


def test_two_optimizers_of_one_context_follow_in_order(pool):
    first, second = pool.run(two_models, 2)
    for ours, theirs in zip(first, second, strict=True):
        assert all(map(torch.equal, ours, theirs))


def schedules_apart(group: Any) -> str:
    """A scheduler that only runs with batches is behind on the process that had fewer."""
    job = Job(group, "join")
    scheduler = torch.optim.lr_scheduler.LambdaLR(job.optimizer, lambda step: 0.9**step)
    with job.context():
        for batch in range(job.count(job.me)):
            job.loss(0, batch, job.me).backward()
            job.optimizer.step()
            scheduler.step()
    scheduler.step()
    job.loss(1, 0, job.me).backward()
    with pytest.raises(RuntimeError) as raised:
        job.optimizer.step()
    return str(raised.value)


def test_a_scheduler_that_fell_behind_is_an_error_on_all(pool):
    for message in pool.run(schedules_apart, 2):
        assert "the settings of parameter group 0 differ" in message and "lr=" in message


def alone_in_a_context(group: Any) -> str:
    job = Job(group, "join")
    with pytest.raises(arg_dist.ConfigError) as raised:
        Join([job.optimizer])
    return str(raised.value)


def in_another_group(group: Any) -> str:
    job = Job(group, "join")
    job.optimizer.process_group = dist.new_group(range(dist.get_world_size(group)))
    with pytest.raises(arg_dist.ConfigError) as raised:
        job.model.join()
    return str(raised.value)


def on_own_gradients(group: Any) -> str:
    model = DistributedDataParallel(torch.nn.Linear(4, 4), process_group=group)
    parameters = model.parameters()
    optimizer = arg_dist.AdaRankGrad(parameters, process_group=group, gradient_sync="sketch")
    with pytest.raises(arg_dist.ConfigError) as raised:
        model.join()
    del optimizer
    return str(raised.value)


def test_contexts_that_cannot_work_are_refused_when_built(pool):
    assert all("no gradient for the mean" in told for told in pool.run(on_own_gradients, 2))
    assert all("Join([model, optimizer])" in told for told in pool.run(alone_in_a_context, 2))
    told = pool.run(in_another_group, 4)
    assert all("process_group=model.process_group" in each for each in told)


def without_a_group(group: Any) -> Weights:
    job = Job(group, "join", shared=False)
    with job.context():
        for batch in range(job.count(job.me)):
            job.loss(0, batch, job.me).backward()
            job.optimizer.step()
            job.optimizer.zero_grad()
    return [parameter.detach() for parameter in job.net.parameters()]


def test_an_optimizer_of_each_process_joins_as_any_other(pool):
    first, second = pool.run(without_a_group, 2)
    assert all(map(torch.equal, first, second))
