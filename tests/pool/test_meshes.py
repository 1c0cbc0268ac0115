"""Meshes that cut parameters twice: FSDP2 with tensor parallelism, and experts over an axis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from arg_dist import AdaRankGrad, ConfigError, checkpoint
from tests.launch import models, training
from tests.launch.cases import STEPS
from tests.tolerances import LOSSES, REDUCTION_ORDER_WEIGHTS

NAMES = ("replicate", "fsdp", "tp")
LLAMA_PLAN = {
    "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
    "model.layers.*.mlp.gate_proj": ColwiseParallel(),
    "model.layers.*.mlp.up_proj": ColwiseParallel(),
    "model.layers.*.mlp.down_proj": RowwiseParallel(),
    "lm_head": ColwiseParallel(output_layouts=Replicate()),
}
ATTENTION_PLAN = {
    "model.layers.*.self_attn.q_proj": ColwiseParallel(),
    "model.layers.*.self_attn.k_proj": ColwiseParallel(),
    "model.layers.*.self_attn.v_proj": ColwiseParallel(),
    "model.layers.*.self_attn.o_proj": RowwiseParallel(),
}
SEQUENCE_PLAN = {
    "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "*.norm": SequenceParallel(),
    "*.up": ColwiseParallel(input_layouts=Shard(1)),
    "*.down": RowwiseParallel(output_layouts=Shard(1)),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}


class Block(nn.Module):
    """A layer whose norm is replicated, and sees a part of each sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Layers(nn.Module):
    """Trained with sequence parallelism."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(models.VOCABULARY, width)
        self.first, self.second = Block(width), Block(width)
        self.head = nn.Linear(width, models.VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.embed(tokens))))


def build(name: str) -> nn.Module:
    if name != "sequence":
        return models.build(name)
    torch.manual_seed(0)
    return Layers()


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    if not isinstance(model, Layers):
        return model(input_ids=tokens, labels=tokens).loss
    logits = model(tokens)
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def meshes(
    world: dist.ProcessGroup, shape: tuple[int, ...]
) -> tuple[DeviceMesh, dist.ProcessGroup]:
    """A mesh of this process, and the group of its processes: of all four, or of two of them."""
    names = NAMES[-len(shape) :]
    if torch.Size(shape).numel() == dist.get_world_size(world):
        return init_device_mesh("cpu", shape, mesh_dim_names=names), world
    root = init_device_mesh("cpu", (2, *shape), mesh_dim_names=("job", *names))
    cut = names[max(range(len(shape)), key=lambda axis: shape[axis])]
    return root[names], root.get_group(cut)


def cut_by(mesh: DeviceMesh, name: str) -> tuple[nn.Module, DeviceMesh]:
    """A model cut by FSDP2 on a tensor-parallel model, and the mesh of its batches."""
    model, plan = build(name), SEQUENCE_PLAN
    if name == "llama":
        plan = LLAMA_PLAN | (ATTENTION_PLAN if mesh["tp"].size() <= 2 else {})  # it has two heads
    parallelize_module(model, mesh["tp"], plan)
    data = mesh["replicate", "fsdp"] if mesh.ndim == 3 else mesh["fsdp"]
    layers = [model.first, model.second] if name == "sequence" else model.model.layers
    for layer in (*layers, model):
        fully_shard(layer, mesh=data)
    return model, data


def train(world: dist.ProcessGroup, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Losses, ranks and state of a run on a mesh."""
    mesh, group = meshes(world, shape)
    model, data = cut_by(mesh, name)
    optimizer = training.optimizer_of(model, process_group=group)
    at, count = data.get_coordinate(), data.size()
    me = at[0] * data.size(1) + at[1] if data.ndim == 2 else at[0]
    share = models.BATCH // count
    losses, ranks = [], []
    for step in range(STEPS):
        loss = loss_of(model, models.batch(step)[me * share : (me + 1) * share])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total, group=group)
        losses.append(total.item() / dist.get_world_size(group))
        ranks.append(training.ranks_now(optimizer))
    return {"losses": losses, "ranks": ranks, "state_bytes": optimizer.state_bytes()}


@pytest.fixture(scope="module")
def alone() -> Callable[[str], dict[str, Any]]:
    known: dict[str, dict[str, Any]] = {}

    def run(name: str) -> dict[str, Any]:
        if name not in known:
            model = build(name)
            optimizer = training.optimizer_of(model, process_group=None)
            losses, ranks = [], []
            for step in range(STEPS):
                loss = loss_of(model, models.batch(step))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                ranks.append(training.ranks_now(optimizer))
            held = optimizer.state_bytes()
            known[name] = {"losses": losses, "ranks": ranks, "state_bytes": held}
        return known[name]

    return run


@pytest.mark.parametrize(
    ("name", "shape"),
    [("llama", shape) for shape in ((1, 2), (2, 2), (1, 4), (4, 1), (2, 1, 2))]
    + [("sequence", shape) for shape in ((2, 1), (2, 2), (1, 4), (2, 1, 2))],
)
def test_training_on_a_mesh_is_training_alone(pool, alone, name, shape):
    expected = alone(name)
    results = pool.run(train, 4, name, shape, seconds=90)
    for result in results:
        LOSSES.check(torch.tensor(result["losses"]), torch.tensor(expected["losses"]))
        for found, whole in zip(result["ranks"], expected["ranks"], strict=True):
            assert found == {key: whole[key] for key in found}
    jobs = len(results) // torch.Size(shape).numel()
    held = sum(result["state_bytes"] for result in results) / jobs
    assert held <= 1.03 * expected["state_bytes"]


CUTS = {
    "experts": ((2, 12, 10), (Shard(1), Shard(0))),
    "block": ((10, 14), (Shard(0), Shard(1))),
    "uneven": ((7, 5), (Shard(1), Shard(0))),
    "columns": ((6, 9), (Replicate(), Shard(1))),
    "embed_tokens": ((9, 7), (Shard(1), Shard(0))),
    "bias": ((5,), (Replicate(), Shard(0))),
    "norm": ((6,), (Replicate(), Replicate())),
}


def gradients(step: int) -> dict[str, Tensor]:
    """Of all parameters; an expert gets none in the first steps, and then both do."""
    generator = torch.Generator().manual_seed(step)
    found = {name: torch.randn(shape, generator=generator) for name, (shape, _) in CUTS.items()}
    if step < 3:
        found["experts"][1] = 0.0
    return found


def take(optimizer: AdaRankGrad, parameters: dict[str, Any], steps: range, cut: Any) -> None:
    for step in steps:
        for name, gradient in gradients(step).items():
            parameters[name].grad = cut(gradient, name)
        optimizer.step()


def by_hand(group: dist.ProcessGroup, folder: str) -> dict[str, Tensor]:
    """The weights after ten steps on a mesh of 2 x 2, with a save and a resume after five."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "ep"))

    def cut(whole: Tensor, name: str) -> Tensor:
        return distribute_tensor(whole, mesh, CUTS[name][1])

    parameters = {name: nn.Parameter(cut(weight, name)) for name, weight in gradients(99).items()}
    optimizer = AdaRankGrad(list(parameters.items()), **BY_HAND, process_group=group)
    take(optimizer, parameters, range(5), cut)
    mine = Path(folder) / f"{dist.get_rank()}.pt"
    torch.save(optimizer.state_dict(), mine)
    resumed = AdaRankGrad(list(parameters.items()), **BY_HAND, process_group=group)
    resumed.load_state_dict(torch.load(mine, weights_only=True))
    take(resumed, parameters, range(5, 10), cut)
    return {name: each.detach().full_tensor() for name, each in parameters.items()}


BY_HAND = {"lr": 1e-2, "max_rank": 4, "min_rank": 1, "energy": 0.9, "min_gap": 2, "max_gap": 4}


def test_experts_blocks_and_replicas_train_as_alone_and_resume_on_the_same_mesh(pool, tmp_path):
    parameters = {name: nn.Parameter(weight) for name, weight in gradients(99).items()}
    optimizer = AdaRankGrad(list(parameters.items()), **BY_HAND, process_group=None)
    take(optimizer, parameters, range(10), lambda whole, _: whole)
    for found in pool.run(by_hand, 4, str(tmp_path)):
        for name, weight in parameters.items():
            REDUCTION_ORDER_WEIGHTS.check(found[name], weight.detach())


def refusals(group: dist.ProcessGroup, folder: str) -> list[str]:
    """What is said of saves that cannot be made, and of placements without values."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    parallelize_module(model, mesh["tp"], {"0": RowwiseParallel(input_layouts=Replicate())})
    fully_shard(model, mesh=mesh["fsdp"])
    optimizer = AdaRankGrad(
        list(model.named_parameters()), max_rank=2, min_rank=1, process_group=group
    )
    model(torch.randn(2, 8)).square().sum().backward()
    optimizer.step()
    told = []
    for call in (
        lambda: get_optimizer_state_dict(model, optimizer),
        lambda: checkpoint.save(folder, optimizer, model=model, step=1),
    ):
        try:
            call()
        except RuntimeError as error:
            told.append(str(error))
    sketching = AdaRankGrad(
        list(model.named_parameters()), **BY_HAND, gradient_sync="sketch", process_group=group
    )
    try:
        sketching.step()
    except ConfigError as error:
        told.append(str(error))
    weight = next(model.parameters()).detach()
    partial = nn.Parameter(type(weight).from_local(weight.to_local(), mesh, [Partial(), Shard(0)]))
    partial.grad = torch.zeros_like(partial)
    try:
        AdaRankGrad([("w", partial)], max_rank=2, min_rank=1, process_group=group).step()
    except RuntimeError as error:
        told.append(str(error))
    return told


def test_what_a_mesh_of_two_dimensions_cannot_do_is_said(pool, tmp_path):
    for told in pool.run(refusals, 4, str(tmp_path)):
        merged, saved, sketched, partial = told
        assert merged.startswith("state_dict: PyTorch's distributed checkpoints")
        assert "sharded over a mesh of two dimensions" in saved
        assert sketched.startswith('gradient_sync="sketch": the engine shards the model')
        assert partial.startswith("w: its placements are") and "Partial" in partial


def of_two_seeds(group: dist.ProcessGroup) -> str:
    """What is said where copies of a replicated norm differ."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8))
    with torch.no_grad():
        model[1].weight += dist.get_rank(group) % 2
    parallelize_module(model, mesh["tp"], {"0": RowwiseParallel(input_layouts=Replicate())})
    fully_shard(model, mesh=mesh["fsdp"])
    optimizer = AdaRankGrad(list(model.named_parameters()), **BY_HAND, process_group=group)
    model(torch.randn(2, 8)).square().sum().backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def test_holders_of_one_part_with_different_weights_are_told(pool):
    for told in pool.run(of_two_seeds, 4):
        assert told.startswith("1.weight: processes 0 and 1 of the group hold the same part")
