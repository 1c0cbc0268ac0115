"""With `state_budget`, training over processes is training alone, and the sum of state fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import arg_dist
from arg_dist.recording import rounds
from tests.launch import models, torch_engines, training
from tests.tolerances import LOSSES

BUDGETS = {"llama": 370_000, "odd": 68_000}
"""Bind: without them, ranks would be others."""
MORE = {"energy": 0.9}


class Job:
    """Training under one of the engines, or of a process on its own (`group` is None)."""

    def __init__(
        self, group: dist.ProcessGroup | None, engine: str, name: str, **more: Any
    ) -> None:
        model = models.build(name)
        if group is not None:
            model = getattr(torch_engines, engine).distribute(model, group)
        self.model = getattr(model, "module", model)
        settings = {**MORE, "state_budget": BUDGETS[name], **more}
        self.optimizer = training.optimizer_of(self.model, process_group=group, **settings)
        self.training = training.TorchTraining(model, self.optimizer)
        self.group = group

    def train(self, first: int, last: int) -> training.Run:
        """Losses over all processes, ranks and this process's bytes of state, at each step."""
        me, processes = 0, 1
        if self.group is not None:
            me, processes = dist.get_rank(self.group), dist.get_world_size(self.group)
        share = models.BATCH // processes
        seen: training.Run = {"losses": [], "ranks": [], "bytes": [], "collectives": []}
        for step in range(first, last):
            tokens = models.batch(step)[me * share : (me + 1) * share]
            before = self.optimizer.collectives()
            loss = self.training.micro_step(tokens, 1.0, last=True).detach()
            seen["collectives"].append(self.optimizer.collectives() - before)
            if self.group is not None:
                dist.all_reduce(loss, group=self.group)
            seen["losses"].append(loss.item() / processes)
            seen["ranks"].append(training.ranks_now(self.optimizer))
            seen["bytes"].append(self.optimizer.state_bytes())
        return seen

    def weights(self) -> list[torch.Tensor]:
        held = [fragment for plan in self.optimizer.bind() for fragment in plan.held]
        return [each.view(each.target.detach()).clone() for each in held]


def train(group: Any, engine: str, name: str, **more: Any) -> training.Run:
    return Job(group, engine, name, **more).train(0, training.STEPS)


@pytest.fixture(scope="module")
def alone() -> dict[str, training.Run]:
    return {name: train(None, "", name) for name in BUDGETS}


def fits(runs: list[training.Run], budget: int) -> bool:
    return all(sum(sizes) <= budget for sizes in zip(*(run["bytes"] for run in runs), strict=True))


@pytest.mark.parametrize("name", BUDGETS)
def test_the_budgets_bind_and_are_used(alone, name):
    free = train(None, "", name, state_budget=None)
    assert max(free["bytes"]) > 1.02 * BUDGETS[name]
    assert alone[name]["ranks"][-1] != free["ranks"][-1]
    assert alone[name]["ranks"][0] != alone[name]["ranks"][-1]
    assert fits([alone[name]], BUDGETS[name])


@pytest.mark.parametrize(
    ("processes", "name", "engine"),
    [(n, name, how) for how in ("ROWS", "DDP") for n in (1, 2, 4) for name in BUDGETS]
    + [(2, "llama", "COLUMNS"), (2, "llama", "OFFLOAD")],
)
def test_ranks_are_those_of_one_process_and_the_sum_fits(pool, alone, processes, name, engine):
    results = pool.run(train, processes, engine, name, seconds=60)
    training.check(results, alone[name], LOSSES)
    assert fits(results, BUDGETS[name])


def replicas(group: Any) -> list[training.Run]:
    """What each process saw under HSDP."""
    return train(group, "HSDP", "llama")


def test_each_replica_has_the_budget(pool, alone):
    results = pool.run(replicas, 4, seconds=60)
    training.check(results, alone["llama"], LOSSES)
    assert fits(results, 2 * BUDGETS["llama"])


def collectives(group: Any, budget: Any) -> list[int]:
    """Of each step, with refreshes in the first and in every fifth one after it."""
    more = {"min_gap": 5, "max_gap": 5, "state_budget": budget}
    return train(group, "DDP", "llama", **more)["collectives"]


def test_a_budget_costs_two_collectives_where_something_refreshes_and_none_elsewhere(pool):
    taken = rounds(power_passes=1, residual="orthogonalized", replicated=True)
    steady, refreshing = (1 + count for count in taken)
    for budget, more in ((None, 0), (BUDGETS["llama"], 2)):
        expected = [refreshing + more, *[steady] * 4] * 4
        assert pool.run(collectives, 2, budget, seconds=60) == [expected] * 2


def bases_held_whole(group: Any) -> training.Run:
    return train(group, "DDP", "odd", shard_basis=False)


def test_bases_that_everyone_keeps_count_as_often(pool):
    assert fits(pool.run(bases_held_whole, 4, seconds=60), BUDGETS["odd"])


def too_small(group: Any) -> str:
    try:
        train(group, "DDP", "odd", state_budget=45_000)
    except arg_dist.ConfigError as error:
        return str(error)
    return ""


def test_a_budget_that_is_too_small_is_an_error_on_all_processes(pool):
    first, second = pool.run(too_small, 2)
    assert first == second and first.startswith("state_budget: got 43.9 KiB")


def save_and_go_on(group: Any, folder: Path) -> tuple[training.Run, list[torch.Tensor]]:
    job = Job(group, "ROWS", "odd")
    job.train(0, 8)
    arg_dist.checkpoint.save(folder, job.optimizer, model=job.model, step=8)
    return job.train(8, 20), job.weights()


def go_on_from(
    group: Any, folder: Path, engine: str, more: dict[str, Any]
) -> tuple[training.Run, list[torch.Tensor], int | None]:
    job = Job(group, engine, "odd", **more)
    arg_dist.checkpoint.load(folder, job.optimizer, model=job.model)
    seen = job.train(8, 20)
    return seen, job.weights(), job.optimizer.param_groups[0]["state_budget"]


def test_a_checkpoint_goes_on_with_a_budget_to_the_bit_and_elsewhere(pool, tmp_path):
    folder = tmp_path / "checkpoint"
    straight = pool.run(save_and_go_on, 2, folder, seconds=60)
    again = pool.run(go_on_from, 2, folder, "ROWS", {}, seconds=60)
    for (seen, weights), (same, as_before, budget) in zip(straight, again, strict=True):
        for key in ("losses", "ranks", "bytes"):
            assert same[key] == seen[key]
        assert all(map(torch.equal, as_before, weights))
        assert budget == BUDGETS["odd"]
    moved = [seen for seen, *_ in pool.run(go_on_from, 4, folder, "DDP", {}, seconds=60)]
    training.check(moved, together([seen for seen, _ in straight]), LOSSES)
    assert fits(moved, BUDGETS["odd"])


def together(runs: list[training.Run]) -> training.Run:
    """What one process would see of what several saw."""
    ranks = [
        {name: rank for own in everyone for name, rank in own.items()}
        for everyone in zip(*(run["ranks"] for run in runs), strict=True)
    ]
    return {**runs[0], "ranks": ranks}


def save_without(group: Any, folder: Path) -> None:
    job = Job(group, "DDP", "odd", state_budget=None)
    job.train(0, 8)
    arg_dist.checkpoint.save(folder, job.optimizer, model=job.model, step=8)


@pytest.mark.filterwarnings("ignore:state_budget")
def test_checkpoints_without_a_budget_load_with_one_and_the_other_way_round(pool, tmp_path):
    folder = tmp_path / "checkpoint"
    pool.run(save_without, 2, folder, seconds=60)
    results = pool.run(go_on_from, 2, folder, "ROWS", {}, seconds=60)
    assert sum(seen["bytes"][-1] for seen, *_ in results) <= BUDGETS["odd"]
    other = tmp_path / "budget"
    pool.run(save_and_go_on, 2, other, seconds=60)
    free = pool.run(go_on_from, 2, other, "ROWS", {"state_budget": None}, seconds=60)
    assert [budget for *_, budget in free] == [None, None]
