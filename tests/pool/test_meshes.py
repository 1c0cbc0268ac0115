"""Meshes that cut parameters twice: FSDP2 with tensor parallelism, and experts over an axis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from arg_dist import AdaRankGrad, ConfigError, checkpoint
from arg_dist.checkpoint.index import read_index, tensor_key
from arg_dist.checkpoint.offline import whole_weight
from arg_dist.checkpoint.slices import SliceReader
from arg_dist.sharding.shard import local_part
from tests.launch import mesh_engines, models, training
from tests.tolerances import LOSSES, REDUCTION_ORDER_WEIGHTS


def train(world: dist.ProcessGroup, name: str, shape: tuple[int, ...]) -> training.Run:
    job, group = mesh_engines.start(world, name, shape)
    return training.train(job, group=group, place=job.place)


@pytest.fixture(scope="module")
def alone() -> Callable[[str], training.Run]:
    known: dict[str, training.Run] = {}

    def run(name: str) -> training.Run:
        if name not in known:
            model = models.build(name)
            optimizer = training.optimizer_of(model, process_group=None)
            known[name] = training.train(mesh_engines.MeshTraining(model, optimizer))
        return known[name]

    return run


def check(results: list[training.Run], expected: training.Run, copies: int = 1) -> None:
    """Losses and ranks, and the state over all processes, of which some may be copies."""
    training.check(results, expected, LOSSES)
    held = sum(result["sizes"][-1] for result in results) / copies
    assert held <= 1.03 * expected["sizes"][-1]


@pytest.mark.parametrize(
    ("name", "shape"),
    [("llama", shape) for shape in ((1, 2), (2, 1), (2, 2), (1, 4), (4, 1), (2, 1, 2))]
    + [("fused", shape) for shape in ((1, 2), (2, 2), (1, 4), (4, 1), (2, 1, 2))]
    + [("sequence", shape) for shape in ((2, 1), (2, 2), (1, 4), (4, 1), (2, 1, 2))]
    + [("two experts", shape) for shape in ((1, 2), (2, 1), (2, 2), (4, 1), (2, 1, 2))],
)
def test_training_on_a_mesh_is_training_alone(pool, alone, name, shape):
    results = pool.run(train, 4, name, shape, seconds=90)
    check(results, alone(name), copies=len(results) // torch.Size(shape).numel())


def as_distributed(group: dist.ProcessGroup, folder: Path, sizes: dict[str, int]) -> training.Run:
    job = mesh_engines.from_transformers(folder, **sizes)
    return training.train(job, group=group, place=job.place)


AUTO = {"tp_plan": "auto"}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama", {"tp_size": 2, "fsdp_size": 2, **AUTO}),
        ("llama", {"tp_size": 2, "dp_replicate_size": 2, **AUTO}),
        ("moe", {"tp_size": 2, "fsdp_size": 2, "ep_size": 2}),
        ("moe", {"fsdp_size": 4, "ep_size": 4}),
    ],
)
def test_what_transformers_distributes_trains_as_alone(pool, alone, tmp_path, name, sizes):
    models.build(name).save_pretrained(tmp_path)
    check(pool.run(as_distributed, 4, tmp_path, sizes, seconds=90), alone(name))


def packed(group: dist.ProcessGroup, folder: Path) -> str:
    job = mesh_engines.from_transformers(folder, tp_size=2, fsdp_size=2, tp_plan="auto")
    try:
        job.optimizer.bind()
    except RuntimeError as error:
        return str(error)
    return ""


def test_fused_matrices_that_tensor_parallelism_cuts_in_pieces_are_refused(pool, tmp_path):
    models.build("moe").save_pretrained(tmp_path)
    for told in pool.run(packed, 4, tmp_path):
        assert told.startswith("model.layers.0.mlp.experts.gate_up_proj: with the placements")
        assert "several separate pieces of dimension 1" in told


CUTS = {
    "experts": ((2, 12, 10), (Shard(1), Shard(0))),
    "block": ((10, 14), (Shard(0), Shard(1))),
    "uneven": ((7, 5), (Shard(1), Shard(0))),
    "narrow": ((2, 9), (Shard(0), Shard(1))),
    "column": ((6, 1), (Shard(0), Shard(1))),
    "columns": ((6, 9), (Replicate(), Shard(1))),
    "embed_tokens": ((9, 7), (Shard(1), Shard(0))),
    "bias": ((5,), (Replicate(), Shard(0))),
    "norm": ((6,), (Replicate(), Replicate())),
    "scale": ((), (Replicate(), Replicate())),
    "frozen": ((5, 4), (Shard(1), Shard(0))),
    "frozen_norm": ((4,), (Replicate(), Shard(0))),
    "buffer": ((3, 4), (Shard(1), Replicate())),
}
"""Shapes and placements; the last three do not train."""
TRAINED = list(CUTS)[:-3]
Cut = Callable[[Tensor, str], Tensor]


def values(seed: int) -> dict[str, Tensor]:
    """Weights, or gradients; an expert gets none in the first steps, and then both do."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator) for name, (shape, _) in CUTS.items()}
    if seed < 3:
        found["experts"][1] = 0.0
    return found


class ByHand:
    """A model without a forward pass, whose tensors are cut in some way, and its optimizer."""

    def __init__(self, cut: Cut, seed: int = 99, process_group: Any = None) -> None:
        self.cut, self.model = cut, nn.Module()
        for name, whole in values(seed).items():
            if name == "buffer":
                self.model.register_buffer(name, cut(whole, name))
            else:
                parameter = nn.Parameter(cut(whole, name), requires_grad=name in TRAINED)
                self.model.register_parameter(name, parameter)
        named = [(name, self.model.get_parameter(name)) for name in TRAINED]
        self.optimizer = AdaRankGrad(named, **BY_HAND, process_group=process_group)

    def take(self, steps: range) -> None:
        for step in steps:
            gradients = values(step)
            for name in TRAINED:
                gradient = self.cut(gradients[name], name)
                # the process of an expert to which no token went has none
                is_none = name == "experts" and not local_part(gradient).any()
                self.model.get_parameter(name).grad = None if is_none else gradient
            self.optimizer.step()

    def save(self, folder: Path) -> None:
        checkpoint.save(folder, self.optimizer, model=self.model, step=5)

    def load(self, folder: Path) -> None:
        checkpoint.load(folder, self.optimizer, model=self.model)

    def weights(self) -> dict[str, Tensor]:
        tensors = {name: value.detach() for name, value in self.model.state_dict().items()}
        return {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in tensors.items()
        }


BY_HAND = {"lr": 1e-2, "max_rank": 4, "min_rank": 1, "energy": 0.9, "min_gap": 2, "max_gap": 4}
WAYS = {"2x2": (2, 2), "4x1": (4, 1), "1x4": (1, 4), "4": (4,), "copies": ()}


def whole(tensor: Tensor, _: str) -> Tensor:
    return tensor


def start(way: str, group: dist.ProcessGroup, **more: Any) -> ByHand:
    """On a mesh of that form; as FSDP2 alone would cut it; or held by every process."""
    if not WAYS[way]:
        return ByHand(whole, process_group=group, **more)
    mesh = init_device_mesh("cpu", WAYS[way])

    def cut(tensor: Tensor, name: str) -> Tensor:
        placements = CUTS[name][1] if mesh.ndim == 2 else [Shard(0)]
        if mesh.ndim == 1 and not tensor.ndim:
            placements = [Replicate()]
        return distribute_tensor(tensor, mesh, placements)

    return ByHand(cut, process_group=group, **more)


def move(group: dist.ProcessGroup, folder: Path) -> dict[str, dict[str, Tensor]]:
    """The weights after ten steps: on a mesh of 2 x 2, or moved from it in the middle."""
    first = start("2x2", group)
    first.take(range(5))
    first.save(folder / "first")
    mine = folder / f"{dist.get_rank()}.pt"
    torch.save(first.optimizer.state_dict(), mine)
    first.optimizer.load_state_dict(torch.load(mine, weights_only=True))
    first.take(range(5, 10))
    found = {"as it was": first.weights()}
    for way in WAYS:
        moved = start(way, group, seed=100)
        moved.load(folder / "first")
        moved.save(folder / way)
        moved.take(range(5, 10))
        found[way] = moved.weights()
    return found


def content(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that a checkpoint has of weights and state, put together."""
    index, found, numbers = read_index(folder), {}, {}
    with SliceReader(folder, index) as reader:
        for name in index.weights:
            found[name] = whole_weight(reader, name)
        for name, entry in index.states.items():
            numbers[name] = entry.numbers, entry.lists, entry.shape, entry.side
            for part, sliced in entry.tensors.items():
                key = tensor_key("state", name, part)
                box = tuple((0, size) for size in sliced.shape)
                if entry.kind == "tensor":
                    box = ((0, torch.Size(entry.shape).numel()),)
                    values = reader.elements(entry, sliced, key, box, transposed=False)
                    found[f"{name}.{part}"] = values
                else:
                    found[f"{name}.{part}"] = reader.rows(sliced, key, box[0])
    return found, numbers


def test_what_a_mesh_of_two_dimensions_saves_goes_on_anywhere(pool, tmp_path):
    alone = ByHand(whole)
    alone.take(range(10))
    for found in pool.run(move, 4, tmp_path, seconds=60):
        for weights in found.values():
            for name, weight in alone.weights().items():
                REDUCTION_ORDER_WEIGHTS.check(weights[name], weight)
    moved = ByHand(whole, seed=100)
    moved.load(tmp_path / "first")
    moved.save(tmp_path / "alone")
    moved.take(range(5, 10))
    for name, weight in alone.weights().items():
        REDUCTION_ORDER_WEIGHTS.check(moved.weights()[name], weight)
    tensors, numbers = content(tmp_path / "first")
    assert set(tensors) >= set(CUTS)
    for way in (*WAYS, "alone"):
        again, same = content(tmp_path / way)
        assert same == numbers and again.keys() == tensors.keys()
        assert all(torch.equal(again[key], tensors[key]) for key in tensors), way


def norm_beside(group: dist.ProcessGroup) -> tuple[nn.Module, Any]:
    """A tensor-parallel layer, and a norm that stays a plain tensor; a mesh of two axes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8))
    parallelize_module(model, mesh["tp"], {"0": RowwiseParallel(input_layouts=Replicate())})
    fully_shard(model[0], mesh=mesh["fsdp"])
    return model, mesh


def refusals(group: dist.ProcessGroup) -> list[str]:
    """What is said of sketches over a mesh, and of placements without values."""
    model, mesh = norm_beside(group)
    model(torch.ones(2, 8)).square().sum().backward()
    told = []
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


def test_what_a_mesh_of_two_dimensions_cannot_do_is_said(pool):
    for sketched, partial in pool.run(refusals, 4):
        assert sketched.startswith('gradient_sync="sketch": the engine shards the model')
        assert partial.startswith("w: its placements are") and "Partial" in partial


def differing(group: dist.ProcessGroup, what: str) -> str:
    """What is said where holders of a norm have other weights, or other gradients."""
    model, _ = norm_beside(group)
    if what == "weights":
        with torch.no_grad():
            model[1].weight += dist.get_rank(group) % 2
    optimizer = AdaRankGrad(list(model.named_parameters()), **BY_HAND, process_group=group)
    model(torch.ones(2, 8)).square().sum().backward()
    if what == "gradient":
        model[1].weight.grad += dist.get_rank(group) // 2
    before = model[1].weight.detach().clone()
    try:
        optimizer.step()
    except RuntimeError as error:
        assert torch.equal(model[1].weight, before)
        return str(error)
    return ""


def test_holders_of_one_part_that_differ_are_told(pool):
    for told in pool.run(differing, 4, "weights"):
        assert told.startswith("1.weight: processes 0 and 1 of the group hold the same part")
    for told in pool.run(differing, 4, "gradient"):
        assert told.startswith("1.weight: processes 0 and 2 of the job hold the same part of it")
        assert "its gradient differs" in told
    assert set(pool.run(differing, 4, "nothing")) == {""}
