"""PyTorch's own engines: DDP, and FSDP2 with its ways to cut, in all precisions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from arg_dist.engines.fsdp2 import column_shards
from tests.launch import models
from tests.launch.training import TorchTraining, optimizer_of

Distribute = Callable[[nn.Module, dist.ProcessGroup], nn.Module]
SCALE = 2.0**12
"""Of fp16 losses at the start: low enough for no step of these runs to overflow."""


@dataclass(frozen=True)
class TorchEngine:
    """An engine and a precision.

    Attributes:
        distribute: hands a model to the engine.
        weights: type of the weights that the optimizer trains.
        autocast: type of the products in the forward pass, by ``torch.autocast``.
        loss_scaling: whether a ``GradScaler`` scales losses and skips steps that overflow.
    """

    distribute: Distribute
    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    loss_scaling: bool = False

    def start(
        self, group: dist.ProcessGroup, name: str = "llama", **settings: Any
    ) -> TorchTraining:
        """Training of the model called `name` by all processes of the group."""
        model = self.distribute(models.build(name).to(self.weights), group)
        optimizer = optimizer_of(getattr(model, "module", model), process_group=group, **settings)
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=self.loss_scaling)
        return TorchTraining(model, optimizer, self.autocast, scaler)


def ddp(**options: Any) -> Distribute:
    """The whole model on every process."""

    def distribute(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
        return DistributedDataParallel(model, process_group=group, **options)

    return distribute


def fsdp2(**options: Any) -> Distribute:
    """Layers, then the rest, cut by rows, as a training script would.

    Args:
        **options: of ``fully_shard``; `mesh` and `shard_placement_fn` are functions of the group.
    """

    def distribute(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
        chosen = {"mesh": one_axis, **options}
        for key in {"mesh", "shard_placement_fn"} & chosen.keys():
            chosen[key] = chosen[key](group)
        decoder = getattr(model, "model", model)
        for layer in (*getattr(decoder, "layers", ()), model):
            fully_shard(layer, **chosen)
        return model

    return distribute


def one_axis(group: dist.ProcessGroup) -> DeviceMesh:
    """A mesh over which everything is cut."""
    return DeviceMesh.from_group(group, "cpu")


def pairs_of_replicas(group: dist.ProcessGroup) -> DeviceMesh:
    """Two copies of the model, each cut over half of the processes; for the whole job only."""
    shape = (2, dist.get_world_size(group) // 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


def within_a_copy(group: dist.ProcessGroup) -> DeviceMesh:
    """The same copies, whose gradients nobody averages."""
    return pairs_of_replicas(group)["shard"]


def by_columns(group: dist.ProcessGroup) -> Callable[[nn.Parameter], Any]:
    """Placements that cut wide matrices on their second dimension."""
    return column_shards(dist.get_world_size(group))


BF16, FP16 = torch.bfloat16, torch.float16

DDP = TorchEngine(ddp(find_unused_parameters=True))
DDP_STATIC = TorchEngine(ddp(static_graph=True))
DDP_VIEWS = TorchEngine(ddp(gradient_as_bucket_view=True))
DDP_STATIC_VIEWS = TorchEngine(ddp(static_graph=True, gradient_as_bucket_view=True))
DDP_BF16 = TorchEngine(ddp(), autocast=BF16)
DDP_BF16_WEIGHTS = TorchEngine(ddp(), weights=BF16)
DDP_FP16 = TorchEngine(ddp(), autocast=FP16, loss_scaling=True)

ROWS = TorchEngine(fsdp2())
COLUMNS = TorchEngine(fsdp2(shard_placement_fn=by_columns))
HSDP = TorchEngine(fsdp2(mesh=pairs_of_replicas))
OFFLOAD = TorchEngine(fsdp2(offload_policy=CPUOffloadPolicy(pin_memory=False)))
ROWS_BF16 = TorchEngine(fsdp2(mp_policy=MixedPrecisionPolicy(param_dtype=BF16)))
ROWS_BF16_WEIGHTS = TorchEngine(fsdp2(), weights=BF16)
ROWS_FP16 = TorchEngine(fsdp2(mp_policy=MixedPrecisionPolicy(param_dtype=FP16)), loss_scaling=True)
ROWS_FP16_AUTOCAST = TorchEngine(fsdp2(), autocast=FP16, loss_scaling=True)
