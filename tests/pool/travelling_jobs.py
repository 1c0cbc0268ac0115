"""Jobs whose layers take turns in training, under several engines, and ways to save and load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from matrices import gaussian
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import arg_dist
from arg_dist.checkpoint import Checkpoints
from tests.launch.torch_engines import by_columns, one_axis, pairs_of_replicas

SAVED_AFTER, STEPS = 7, 12
SETTINGS = {
    "max_rank": 4,
    "min_rank": 1,
    "min_gap": 2,
    "max_gap": 4,
    "lr": 1e-2,
    "residual_momentum": 0.9,
}
EACH = 2
"""Steps for which a layer trains before the next one's turn."""


@dataclass
class Job:
    """A model under an engine, its optimizer, and where it writes."""

    model: nn.Sequential
    optimizer: arg_dist.AdaRankGrad
    group: Any
    folder: Path

    def set_turn(self, step: int | None) -> None:
        """Freezes all layers but the one whose turn it is; None: none."""
        for i, layer in enumerate(self.model):
            layer.requires_grad_(step is None or i == step // EACH % len(self.model))

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.set_turn(step)
            for i, parameter in enumerate(self.model.parameters()):
                whole = gaussian(*parameter.shape, seed=50 * step + i)
                parameter.grad = like(whole, parameter) if parameter.requires_grad else None
            self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [local(parameter).clone() for parameter in self.model.parameters()]

    def put_back(self, weights: list[Tensor]) -> None:
        for parameter, weight in zip(self.model.parameters(), weights, strict=True):
            local(parameter).copy_(weight)

    def states(self) -> dict[str, Any]:
        """Everything in the state, but nothing for what is empty."""
        held = [unit for units in self.optimizer.state.values() for unit in units.items()]
        return {f"{name}/{k}": v for name, state in held for k, v in state.items()}


def like(whole: Tensor, parameter: Any) -> Tensor:
    if not hasattr(parameter, "placements"):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)


def local(parameter: Any) -> Tensor:
    own = parameter.detach()
    return own.to_local() if hasattr(own, "placements") else own


def start(group: Any, engine: str, folder: Path, **more: Any) -> Job:
    """A new job; the last layer is smaller than the number of processes, the first is a stack."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 17), nn.Linear(17, 3))
    model[0].register_parameter("stack", nn.Parameter(torch.randn(3, 12, 8)))
    if engine in MESHES:
        mesh, placement = MESHES[engine]
        fully_shard(model, mesh=mesh(group), shard_placement_fn=placement and placement(group))
    own = None if engine == "ALONE" else group
    settings = {**SETTINGS, **more}
    optimizer = arg_dist.AdaRankGrad(model.named_parameters(), process_group=own, **settings)
    return Job(model, optimizer, group, folder)


MESHES: dict[str, tuple[Callable[..., Any], Any]] = {
    "ROWS": (one_axis, None),
    "COLUMNS": (one_axis, by_columns),
    "HSDP": (pairs_of_replicas, None),
}

# -- ways to save and load -------------------------------------------------------------------------


def by_file(job: Job, path: Path) -> None:
    """``torch.save`` by the first process of what was gathered there."""
    job.optimizer.consolidate_state_dict()
    saved = job.optimizer.state_dict()
    if dist.get_rank(job.group) == 0:
        torch.save(saved, path)


def from_file(job: Job, path: Path) -> None:
    job.optimizer.load_state_dict(torch.load(path, weights_only=True))


def by_files(job: Job, path: Path) -> None:
    """``torch.save`` by each process of its own."""
    torch.save(job.optimizer.state_dict(), f"{path}-{dist.get_rank(job.group)}")


def from_files(job: Job, path: Path) -> None:
    own = f"{path}-{dist.get_rank(job.group)}"
    job.optimizer.load_state_dict(torch.load(own, weights_only=False))


def by_ours(job: Job, path: Path) -> None:
    arg_dist.checkpoint.save(path, job.optimizer)


def from_ours(job: Job, path: Path) -> None:
    arg_dist.checkpoint.load(path, job.optimizer)


def by_series(job: Job, path: Path) -> None:
    series = Checkpoints(path, job.optimizer, model=job.model)
    series.save(1)
    series.wait()


def from_series(job: Job, path: Path) -> None:
    assert Checkpoints(path, job.optimizer, model=job.model).load() is not None


def by_dcp(job: Job, path: Path, **options: bool) -> None:
    state = get_optimizer_state_dict(job.model, job.optimizer, options=StateDictOptions(**options))
    dcp.save({"optimizer": state}, checkpoint_id=path, process_group=job.group)


def from_dcp(job: Job, path: Path, **options: bool) -> None:
    chosen = StateDictOptions(**options)
    state = {"optimizer": get_optimizer_state_dict(job.model, job.optimizer, options=chosen)}
    dcp.load(state, checkpoint_id=path, process_group=job.group)
    set_optimizer_state_dict(job.model, job.optimizer, state["optimizer"], options=chosen)


def by_flat_dcp(job: Job, path: Path) -> None:
    by_dcp(job, path, flatten_optimizer_state_dict=True)


def from_flat_dcp(job: Job, path: Path) -> None:
    from_dcp(job, path, flatten_optimizer_state_dict=True)


def by_full(job: Job, path: Path, **options: bool) -> None:
    """One file of all that DCP gathers on the first process."""
    chosen = StateDictOptions(full_state_dict=True, cpu_offload=True, **options)
    state = get_optimizer_state_dict(job.model, job.optimizer, options=chosen)
    if dist.get_rank(job.group) == 0:
        torch.save(state, path)


def from_full(job: Job, path: Path) -> None:
    state = torch.load(path, weights_only=True)
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(job.model, job.optimizer, state, options=options)


def from_first(job: Job, path: Path) -> None:
    state = torch.load(path, weights_only=True) if dist.get_rank(job.group) == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(job.model, job.optimizer, state, options=options)


def by_flat_full(job: Job, path: Path) -> None:
    by_full(job, path, flatten_optimizer_state_dict=True)


Way = tuple[Callable[[Job, Path], None], Callable[[Job, Path], None]]
WAYS: dict[str, Way] = {
    "torch.save": (by_file, from_file),
    "torch.save on each": (by_files, from_files),
    "checkpoint.save": (by_ours, from_ours),
    "Checkpoints": (by_series, from_series),
    "DCP": (by_dcp, from_dcp),
    "DCP, flat": (by_flat_dcp, from_flat_dcp),
    "DCP, full": (by_full, from_full),
    "DCP, full, broadcast": (by_full, from_first),
    "DCP, full, then plain": (by_full, from_file),
}
