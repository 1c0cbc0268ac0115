"""Under FSDP2, PyTorch's distributed checkpoints bring back all of the state, ragged ranks too."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tests.launch import models, torch_engines
from tests.launch.training import ranks_now


class Run:
    """Training under one of the engines, on batches that depend on the step alone."""

    def __init__(self, group: dist.ProcessGroup, name: str, engine: str) -> None:
        self.group = group
        self.training = getattr(torch_engines, engine).start(group, name)
        self.model, self.optimizer = self.training.model, self.training.optimizer

    def train(self, first: int, last: int) -> list[float]:
        share = models.BATCH // dist.get_world_size(self.group)
        start = dist.get_rank(self.group) * share
        losses = []
        for step in range(first, last):
            tokens = models.batch(step)[start : start + share]
            losses.append(self.training.micro_step(tokens, 1.0, last=True).item())
        return losses

    def state(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }


def go_on(group: dist.ProcessGroup, name: str, engine: str, folder: Path) -> None:
    straight = Run(group, name, engine)
    straight.train(0, 8)
    dcp.save(straight.state(), checkpoint_id=folder, process_group=group)
    expected = straight.train(8, 16)
    resumed = Run(group, name, engine)
    state = resumed.state()
    dcp.load(state, checkpoint_id=folder, process_group=group)
    set_model_state_dict(resumed.model, state["model"])
    set_optimizer_state_dict(resumed.model, resumed.optimizer, state["optimizer"])
    assert resumed.train(8, 16) == expected
    assert ranks_now(resumed.optimizer) == ranks_now(straight.optimizer)
    assert resumed.optimizer.state_bytes() == straight.optimizer.state_bytes()


@pytest.mark.parametrize(
    ("processes", "name", "engine"),
    [(2, "llama", "ROWS"), (4, "odd", "ROWS"), (2, "llama", "COLUMNS"), (4, "llama", "HSDP")],
)
def test_a_run_goes_on_to_the_bit(pool, tmp_path, processes, name, engine):
    pool.run(go_on, processes, name, engine, tmp_path / "checkpoint", seconds=60)


def save(group: dist.ProcessGroup, folder: Path) -> None:
    run = Run(group, "llama", "ROWS")
    run.train(0, 3)
    dcp.save(run.state(), checkpoint_id=folder, process_group=group)


def load(group: dist.ProcessGroup, folder: Path) -> str:
    run = Run(group, "llama", "ROWS")
    state = run.state()
    try:
        dcp.load(state, checkpoint_id=folder, process_group=group)
    except BaseException as error:  # DCP's own is no Exception
        return str(error)
    return ""


def test_another_number_of_processes_is_refused_by_name(pool, tmp_path):
    pool.run(save, 2, tmp_path, seconds=60)
    assert all("process 0 of 4" in message for message in pool.run(load, 4, tmp_path, seconds=60))


def told_before_the_first_step(group: dist.ProcessGroup) -> str:
    from accelerate.state import AcceleratorState
    from accelerate.utils import FullyShardedDataParallelPlugin

    run = Run(group, "llama", "ROWS")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="FULL_STATE_DICT")
    with mock.patch.dict(AcceleratorState._shared_state, fsdp_plugin=plugin):
        try:
            run.train(0, 1)
        except ValueError as error:
            return str(error)
    return ""


def test_full_state_dicts_are_refused_before_they_lose_state(pool):
    for message in pool.run(told_before_the_first_step, 2, seconds=60):
        assert "fsdp_state_dict_type" in message and "SHARDED_STATE_DICT" in message
