"""Meshes of several dimensions: FSDP2 on tensor-parallel models, and transformers' own meshes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tests.launch import models
from tests.launch.training import CLIP, TorchTraining, optimizer_of

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
FUSED_PLAN = {
    "layers.*.qkv": ColwiseParallel(),
    "layers.*.out": RowwiseParallel(),
    "layers.*.up": ColwiseParallel(),
    "layers.*.down": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}
SEQUENCE_PLAN = {
    "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "layers.*.norm": SequenceParallel(),
    "layers.*.up": ColwiseParallel(input_layouts=Shard(1)),
    "layers.*.down": RowwiseParallel(output_layouts=Shard(1)),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}


@dataclass
class MeshTraining(TorchTraining):
    """Training on a mesh, where some processes see the same batch.

    Attributes:
        place: which share of a batch this process sees, and how many there are.
        clips: whether gradients are clipped, as on the other engines.
    """

    place: tuple[int, int] = (0, 1)
    clips: bool = False

    def micro_step(self, tokens: Tensor, share: float, last: bool) -> Tensor:
        loss = self.model(input_ids=tokens, labels=tokens).loss
        (loss * share).backward()
        if last:
            if self.clips:
                clip(self.model)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss


def clip(model: nn.Module) -> None:
    """Clips the gradients of parameters on several meshes by their norm over all of them."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            mesh = getattr(parameter, "device_mesh", None)
            by_mesh.setdefault(mesh, []).append(parameter.grad)
    norms = [torch.nn.utils.get_total_norm(each) for each in by_mesh.values()]
    whole = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in norms]
    norm = torch.stack(whole).norm()
    for gradients in by_mesh.values():
        for gradient in gradients:
            gradient.mul_(min(1.0, CLIP / (float(norm) + 1e-6)))


def meshes(
    world: dist.ProcessGroup, shape: tuple[int, ...]
) -> tuple[DeviceMesh, dist.ProcessGroup]:
    """A mesh of this process, and the group of its processes: of all of them, or of two of four."""
    names = NAMES[-len(shape) :]
    if torch.Size(shape).numel() == dist.get_world_size(world):
        return init_device_mesh("cpu", shape, mesh_dim_names=names), world
    root = init_device_mesh("cpu", (2, *shape), mesh_dim_names=("job", *names))
    cut = names[max(range(len(shape)), key=lambda axis: shape[axis])]
    return root[names], root.get_group(cut)


def cut_by(mesh: DeviceMesh, model: nn.Module, name: str) -> DeviceMesh:
    """Lets FSDP2 cut a tensor-parallel model, and returns the mesh of its batches.

    Args:
        mesh: the processes.
        model: the model.
        name: what decides how tensor parallelism cuts it.
    """
    data = mesh["replicate", "fsdp"] if mesh.ndim == 3 else mesh["fsdp"]
    if name == "two experts":
        for layer in model.layers:
            distribute_experts(layer.experts, mesh["tp"])
            # there are fewer experts than processes: each is cut by its rows
            fully_shard(layer.experts, mesh=data, shard_placement_fn=lambda _: Shard(1))
        plan = {}
    elif name == "llama":
        plan = LLAMA_PLAN | (ATTENTION_PLAN if mesh["tp"].size() <= 2 else {})  # it has two heads
    else:
        plan = {"fused": FUSED_PLAN, "sequence": SEQUENCE_PLAN}[name]
    if plan:
        parallelize_module(model, mesh["tp"], plan)
    for layer in (*getattr(model, "model", model).layers, model):
        fully_shard(layer, mesh=data)
    return data


def distribute_experts(experts: models.Experts, mesh: DeviceMesh) -> None:
    """Gives each process of a mesh some of the experts."""
    experts.mesh = mesh
    for name, parameter in list(experts.named_parameters()):
        cut = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
        experts.register_parameter(name, nn.Parameter(cut))


def start(
    world: dist.ProcessGroup, name: str, shape: tuple[int, ...], *, clips: bool = False
) -> tuple[MeshTraining, dist.ProcessGroup]:
    """Training of the model called `name` on a mesh, and the processes of the mesh."""
    mesh, group = meshes(world, shape)
    model = models.build(name)
    data = cut_by(mesh, model, name)
    optimizer = optimizer_of(model, process_group=group)
    at = data.get_coordinate()
    me = at[0] * data.size(1) + at[1] if data.ndim == 2 else at[0]
    return MeshTraining(model, optimizer, place=(me, data.size()), clips=clips), group


def from_transformers(folder: Path, **sizes: Any) -> MeshTraining:
    """Training of a saved model as transformers distributes it over all processes.

    Args:
        folder: of the model.
        **sizes: of transformers' DistributedConfig.
    """
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    eager = dict.fromkeys(("attn_implementation", "experts_implementation"), "eager")
    config = DistributedConfig(**sizes)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, **eager)
    optimizer = optimizer_of(model)
    replicas = sizes.get("fsdp_size", 1) * sizes.get("dp_replicate_size", 1)
    same = dist.get_world_size() // replicas
    return MeshTraining(model, optimizer, place=(dist.get_rank() // same, replicas))
