"""``gradient_sync="sketch"`` between copies of a model, each of which FSDP2 shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import arg_dist
from arg_dist import AdaRankGrad, ConfigError, checkpoint
from tests.launch import models, training
from tests.launch.cases import SETTINGS, STEPS
from tests.tolerances import CLIPPED, REDUCTION_ORDER

COPIES = 2
SKETCH = {"gradient_sync": "sketch"}
EXACT = {**SKETCH, "residual": "none"}


class Job:
    """A model that FSDP2 shards in each of two copies, and its optimizer.

    Attributes:
        copies: the processes that hold the same part of the model.
    """

    def __init__(self, group: dist.ProcessGroup, name: str, settings: dict[str, Any]) -> None:
        each = dist.get_world_size(group) // COPIES
        mesh = init_device_mesh("cpu", (COPIES, each), mesh_dim_names=("replicate", "shard"))
        self.copies = mesh["replicate"].get_group()
        self.model: nn.Module = models.build(name)
        for layer in (*getattr(getattr(self.model, "model", self.model), "layers", ()), self.model):
            fully_shard(layer, mesh=mesh["shard"])
        self.optimizer = training.optimizer_of(self.model, process_group=group, **settings)
        self.group = group

    def step(self, step: int, *, same_batch: bool = False) -> float:
        """The loss over all processes, before a step."""
        me, count = dist.get_rank(self.group), dist.get_world_size(self.group)
        share = models.BATCH // count
        mine = 0 if same_batch else me * share
        tokens = models.batch(step)[mine : mine + share]
        loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total.item() / count

    def weights(self) -> list[Tensor]:
        """What this process holds of them."""
        return [parameter.detach().to_local() for parameter in self.model.parameters()]

    def are_equal(self) -> bool:
        """Whether the copies are, bit by bit."""
        for mine in self.weights():
            others = [torch.empty_like(mine) for _ in range(COPIES)]
            dist.all_gather(others, mine.contiguous(), group=self.copies)
            if not all(torch.equal(mine, other) for other in others):
                return False
        return True


def alone(name: str, first: int = 0, last: int = STEPS, **settings: Any) -> training.Run:
    """The same by one process that has the mean."""
    model = models.build(name)
    optimizer = training.optimizer_of(model, process_group=None, **settings)
    return one_process(model, optimizer, first, last)


def one_process(model: nn.Module, optimizer: AdaRankGrad, first: int, last: int) -> training.Run:
    losses, ranks = [], []
    for step in range(first, last):
        tokens = models.batch(step)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        ranks.append(training.ranks_now(optimizer))
    return {"losses": losses, "ranks": ranks, "state_bytes": optimizer.state_bytes()}


def train(group: dist.ProcessGroup, name: str, settings: dict[str, Any]) -> training.Run:
    job = Job(group, name, settings)
    losses, ranks = [], []
    for step in range(STEPS):
        losses.append(job.step(step))
        ranks.append(training.ranks_now(job.optimizer))
    held = job.optimizer.state_bytes()
    return {"losses": losses, "ranks": ranks, "equal": job.are_equal(), "state_bytes": held}


@pytest.mark.parametrize(("processes", "name"), [(4, "llama"), (4, "odd")])
def test_copies_without_a_residual_train_as_one_process(pool, processes, name):
    expected = alone(name, residual="none")
    results = pool.run(train, processes, name, EXACT, seconds=60)
    for result in results:
        REDUCTION_ORDER.check(torch.tensor(result["losses"]), torch.tensor(expected["losses"]))
    for step, everyone in enumerate(zip(*(result["ranks"] for result in results), strict=True)):
        together = {name: rank for own in everyone for name, rank in own.items()}
        assert all(own.items() <= together.items() for own in everyone)
        # of the norms of large gradients there are estimates
        assert all(abs(together[k] - rank) <= 1 for k, rank in expected["ranks"][step].items())
    assert all(result["equal"] for result in results)
    bases = 2 * COPIES  # each process keeps all that it needs of them
    assert sum(result["state_bytes"] for result in results) <= bases * expected["state_bytes"]


@pytest.mark.parametrize(
    "settings", [{}, {"residual_sync_bits": 1}, {"state_budget": "500KiB"}, {"shard_basis": True}]
)
def test_copies_stay_equal_and_learn(pool, settings):
    results = pool.run(train, 4, "llama", {**SKETCH, **settings}, seconds=60)
    assert all(result["equal"] for result in results)
    losses = results[0]["losses"]
    assert all(result["losses"] == losses for result in results)
    assert losses[-1] < losses[0] - 0.5


def first_half(group: dist.ProcessGroup, folder: Path, settings: dict[str, Any]) -> None:
    job = Job(group, "llama", settings)
    for step in range(STEPS // 2):
        job.step(step)
    checkpoint.save(folder, job.optimizer, model=job.model, step=STEPS // 2)


def second_half(group: dist.ProcessGroup, folder: Path, settings: dict[str, Any]) -> list[float]:
    job = Job(group, "llama", settings)
    assert checkpoint.load(folder, job.optimizer, model=job.model).step == STEPS // 2
    return [job.step(step) for step in range(STEPS // 2, STEPS)]


def test_copies_resume_to_the_bit(pool, tmp_path):
    whole = pool.run(train, 4, "llama", SKETCH, seconds=60)[0]["losses"]
    pool.run(first_half, 4, tmp_path / "half", SKETCH, seconds=60)
    results = pool.run(second_half, 4, tmp_path / "half", SKETCH, seconds=60)
    assert all(losses == whole[STEPS // 2 :] for losses in results)


def test_copies_resume_as_one_process_and_the_other_way(pool, tmp_path):
    expected = alone("llama", residual="none")["losses"]
    pool.run(first_half, 4, tmp_path / "copies", EXACT, seconds=60)
    model = models.build("llama")
    optimizer = training.optimizer_of(model, process_group=None, residual="none")
    checkpoint.load(tmp_path / "copies", optimizer, model=model)
    losses = one_process(model, optimizer, STEPS // 2, STEPS)["losses"]
    REDUCTION_ORDER.check(torch.tensor(losses), torch.tensor(expected[STEPS // 2 :]))

    model = models.build("llama")
    optimizer = training.optimizer_of(model, process_group=None, residual="none")
    one_process(model, optimizer, 0, STEPS // 2)
    checkpoint.save(tmp_path / "one", optimizer, model=model, step=STEPS // 2)
    for losses in pool.run(second_half, 4, tmp_path / "one", EXACT, seconds=60):
        REDUCTION_ORDER.check(torch.tensor(losses), torch.tensor(expected[STEPS // 2 :]))


def state_dict_of(group: dist.ProcessGroup) -> str:
    job = Job(group, "llama", EXACT)
    job.step(0)
    with pytest.raises(RuntimeError) as raised:
        get_optimizer_state_dict(job.model, job.optimizer)
    return str(raised.value)


def test_what_pytorchs_checkpoints_cannot_express_is_refused(pool):
    assert all("save with arg_dist.checkpoint" in told for told in pool.run(state_dict_of, 4))


def clipped(group: dist.ProcessGroup) -> tuple[float, float]:
    """The norm of the mean gradient after the step that has clipped it, and before."""
    job = Job(group, "llama", {**EXACT, "max_grad_norm": 0.1})
    norms = []
    tokens = models.batch(0)[dist.get_rank(group) :][:1]
    job.model(input_ids=tokens, labels=tokens).loss.backward()
    for _ in range(2):
        total = torch.zeros(())
        for parameter in job.model.parameters():
            mean = parameter.grad.to_local().clone()
            dist.all_reduce(mean, group=job.copies)
            total += (mean / COPIES).square().sum() / COPIES  # every part is held once a copy
        dist.all_reduce(total, group=group)
        norms.append(total.sqrt().item())
        job.optimizer.step()
    return norms[0], norms[1]


def test_the_mean_of_the_copies_is_clipped(pool):
    for before, after in pool.run(clipped, 4):
        assert before > 0.5
        CLIPPED.check(after, 0.1)


def refused(group: dist.ProcessGroup, kind: str) -> str:
    """The error of a job that cannot be right."""
    settings = {"matched": {"residual": "matched"}, "budget": {"gradient_budget": "1MiB"}}
    job = Job(group, "llama", {**SKETCH, **settings.get(kind, {})})
    if kind == "other weights" and dist.get_rank(group) == 3:
        next(job.model.parameters()).data.to_local().add_(1e-3)
    with pytest.raises((RuntimeError, ConfigError)) as raised:
        job.step(0, same_batch=kind == "same batch")
    return str(raised.value)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("other weights", "processes 1 and 3 of the job hold the same part of it"),
        ("same batch", "all processes read the same batches"),
        ("matched", 'residual="matched" needs the norms of whole rows'),
        ("budget", "gradient_budget: the engine sums the gradients of a copy"),
    ],
)
def test_what_cannot_be_right_is_refused(pool, kind, told):
    assert all(told in error for error in pool.run(refused, 4, kind))


def sharded_over_all(group: dist.ProcessGroup) -> str:
    model = nn.Linear(16, 12)
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    groups = arg_dist.param_groups(model)
    optimizer = AdaRankGrad(groups, process_group=group, **{**SETTINGS, **SKETCH})
    model(torch.ones(2, 16)).sum().backward()
    with pytest.raises(ConfigError) as raised:
        optimizer.step()
    return str(raised.value)


def test_one_copy_over_all_processes_is_refused(pool):
    assert all('mesh=mesh["shard"]' in told for told in pool.run(sharded_over_all, 2))
