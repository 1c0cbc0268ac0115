"""Of DTensors, PyTorch's distributed checkpoints bring back all of the state, ragged ranks too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from arg_dist import AdaRankGrad
from tests.launch import mesh_engines, models, torch_engines
from tests.launch.cases import SETTINGS
from tests.launch.training import ranks_now


class Run:
    """Training under one of the engines, on batches that depend on the step alone."""

    def __init__(self, group: dist.ProcessGroup, name: str, engine: str) -> None:
        self.group = group
        self.place = dist.get_rank(group), dist.get_world_size(group)
        if engine == "MESH":
            self.training, _ = mesh_engines.start(group, name, (2, 2))
            self.place = self.training.place
        else:
            self.training = getattr(torch_engines, engine).start(group, name)
        self.model, self.optimizer = self.training.model, self.training.optimizer

    def train(self, first: int, last: int) -> list[float]:
        share = models.BATCH // self.place[1]
        start = self.place[0] * share
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
    [
        (2, "llama", "ROWS"),
        (4, "odd", "ROWS"),
        (2, "llama", "COLUMNS"),
        (4, "llama", "HSDP"),
        (4, "llama", "MESH"),
        (4, "two experts", "MESH"),
    ],
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


@contextmanager
def first_process_saves() -> Iterator[None]:
    """What accelerate is told by ``fsdp_state_dict_type: FULL_STATE_DICT``."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="FULL_STATE_DICT")
    with mock.patch.dict(AcceleratorState._shared_state, fsdp_plugin=plugin):
        yield


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def write_on_first(group: dist.ProcessGroup, run: Run, file: Path) -> None:
    with first_process_saves():
        saved = {
            "model": get_model_state_dict(run.model, options=WHOLE),
            "optimizer": get_optimizer_state_dict(run.model, run.optimizer, options=WHOLE),
        }
    if dist.get_rank(group) == 0:
        torch.save(saved, file)


def read_on_first(group: dist.ProcessGroup, run: Run, file: Path) -> None:
    saved: dict[str, Any] = {"model": {}, "optimizer": {}}
    if dist.get_rank(group) == 0:
        saved = torch.load(file, weights_only=True)
    with first_process_saves():
        set_model_state_dict(run.model, saved["model"], options=FROM_FIRST)
        set_optimizer_state_dict(run.model, run.optimizer, saved["optimizer"], options=FROM_FIRST)


def go_on_from_one_file(group: dist.ProcessGroup, engine: str, file: Path) -> None:
    straight = Run(group, "llama", engine)
    straight.train(0, 8)
    write_on_first(group, straight, file)
    expected = straight.train(8, 16)
    resumed = Run(group, "llama", engine)
    read_on_first(group, resumed, file)
    assert resumed.train(8, 16) == expected
    assert ranks_now(resumed.optimizer) == ranks_now(straight.optimizer)


@pytest.mark.parametrize("engine", ["ROWS", "HSDP", "MESH"])
def test_a_run_goes_on_from_what_the_first_process_saved(pool, tmp_path, engine):
    pool.run(go_on_from_one_file, 4, engine, tmp_path / "all.pt", seconds=60)


def write(group: dist.ProcessGroup, file: Path) -> None:
    run = Run(group, "llama", "ROWS")
    run.train(0, 3)
    write_on_first(group, run, file)


def read(group: dist.ProcessGroup, file: Path) -> str:
    saved = torch.load(file, weights_only=True)["optimizer"]  # everywhere: nothing is broadcast
    run = Run(group, "llama", "ROWS")
    run.state()  # binds, as PyTorch does before it loads
    try:
        set_optimizer_state_dict(run.model, run.optimizer, saved)
    except ValueError as error:
        return str(error)
    return ""


def test_one_file_of_another_number_of_processes_is_refused_by_name(pool, tmp_path):
    pool.run(write, 4, tmp_path / "all.pt", seconds=60)
    for i, message in enumerate(pool.run(read, 2, tmp_path / "all.pt", seconds=60)):
        assert f"no state of process {i} of 2 was saved, but of process 0 of 4" in message
        assert "save with arg_dist.checkpoint" in message


def go_on_from_own_files(group: dist.ProcessGroup, folder: Path) -> None:
    """As verl does, of bare parameters."""
    straight = Run(group, "llama", "ROWS")
    straight.optimizer = straight.training.optimizer = bare(straight)
    straight.train(0, 4)
    file = folder / f"{dist.get_rank(group)}.pt"
    torch.save((straight.model.state_dict(), straight.optimizer.state_dict()), file)
    expected = straight.train(4, 8)
    resumed = Run(group, "llama", "ROWS")
    resumed.optimizer = resumed.training.optimizer = bare(resumed)
    weights, state = torch.load(file, weights_only=False)
    resumed.model.load_state_dict(weights)
    resumed.optimizer.load_state_dict(state)
    assert resumed.train(4, 8) == expected


def bare(run: Run) -> AdaRankGrad:
    return AdaRankGrad(run.model.parameters(), **SETTINGS)


def test_a_run_goes_on_from_files_of_each_process(pool, tmp_path):
    pool.run(go_on_from_own_files, 2, tmp_path, seconds=60)
