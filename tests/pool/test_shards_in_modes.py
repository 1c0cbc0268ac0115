"""Modes of torch around the calls reach no collective and no shard either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ambient_modes
import pytest
import torch
import torch.distributed as dist
from checkpoint_jobs import SETTINGS
from matrices import gaussian
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import arg_dist
from arg_dist import AdaRankGrad
from arg_dist.telemetry import sample_optimizer

PROCESSES = 4
MODES = (
    ("autocast to bf16",),
    ("default device", "default dtype fp64", "inference mode"),
    ("default dtype bf16", "deterministic, memory filled", "precision medium", "no_grad"),
)


def model_of(group: dist.ProcessGroup, how: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9, bias=False))
    for i, parameter in enumerate(model.parameters()):
        parameter.data.copy_(gaussian(*parameter.shape, seed=i))
    if how == "sharded":
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    return model


def optimizer_of(group: dist.ProcessGroup, model: nn.Module) -> AdaRankGrad:
    named = model.named_parameters()
    return AdaRankGrad(named, process_group=group, min_gap=2, max_gap=2, **SETTINGS)


def train_in(group: dist.ProcessGroup, how: str, folder: Path, modes: tuple[str, ...]) -> list[Any]:
    """What every entry point gives on this process; the model computes outside of the modes."""
    model, found = model_of(group, how), []
    with ambient_modes.on(*modes):
        optimizer = optimizer_of(group, model)
    for step in range(4):
        model(gaussian(16, 12, seed=step)).square().mean().backward()
        with ambient_modes.on(*modes):
            optimizer.step()
        optimizer.zero_grad()
    found += held(model, optimizer)
    torch.manual_seed(0)  # which loading restores
    with ambient_modes.on(*modes):
        optimizer.consolidate_state_dict()
        saved = optimizer.state_dict()
        sample = sample_optimizer(optimizer)
        arg_dist.checkpoint.save(folder, optimizer, model=model)
    saved = to_load(group, saved)
    found += [sample.ranks, sample.sent_bytes, optimizer.stats()]
    for load in (load_checkpoint, load_dictionary):
        model = model_of(group, how)
        model(gaussian(16, 12, seed=9)).square().mean().backward()
        torch.manual_seed(0)
        with ambient_modes.on(*modes):
            optimizer = optimizer_of(group, model)
            load(optimizer, model, folder, saved)
            optimizer.step()
        found += held(model, optimizer)
    return found


def load_checkpoint(optimizer: AdaRankGrad, model: nn.Module, folder: Path, saved: Any) -> None:
    arg_dist.checkpoint.load(folder, optimizer, model=model)


def load_dictionary(optimizer: AdaRankGrad, model: nn.Module, folder: Path, saved: Any) -> None:
    optimizer.load_state_dict(saved)


def to_load(group: dist.ProcessGroup, saved: Any) -> Any:
    """The dictionary to load on this process: the first one's if that has all the state."""
    everyone = [None] * PROCESSES
    dist.all_gather_object(everyone, saved if dist.get_rank(group) == 0 else None, group=group)
    first: Any = everyone[0]
    return first if first["process"] == (0, 1) else saved


def held(model: nn.Module, optimizer: AdaRankGrad) -> list[Any]:
    """This process's part of the weights and of the state."""
    found: list[Any] = []
    for parameter in model.parameters():
        local = parameter.detach()
        found.append(local.to_local() if hasattr(local, "to_local") else local)
        for units in optimizer.state[parameter].values():
            found += units.values()
    return [each.clone() if torch.is_tensor(each) else each for each in found]


@pytest.mark.parametrize("how", ["replicated", "sharded"])
def test_a_run_in_modes_is_the_run_without_them(pool, tmp_path, how):
    plain = pool.run(train_in, PROCESSES, how, tmp_path / "plain", (), seconds=60)
    for modes in MODES:
        results = pool.run(train_in, PROCESSES, how, tmp_path / modes[0], modes, seconds=60)
        for mine, expected in zip(results, plain, strict=True):
            for one, other in zip(mine, expected, strict=True):
                same = torch.equal(one, other) if torch.is_tensor(one) else one == other
                assert same, modes
