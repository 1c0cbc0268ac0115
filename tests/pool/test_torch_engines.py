"""PyTorch's own engines give what one process gives: FSDP2, cut in any way, and DDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tolerances import LOSSES, LOW_PRECISION_LOSSES
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import arg_dist
from arg_dist.engines.fsdp2 import column_shards
from tests.launch import models
from tests.launch.cases import SETTINGS

STEPS = 20
HOW = ("rows", "copies")


def distribute(model: torch.nn.Module, group: dist.ProcessGroup, how: str) -> torch.nn.Module:
    """Cuts the layers, then the rest, as a training script would, or copies the model."""
    if how == "copies":
        return DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
    processes = dist.get_world_size(group)
    if how == "replicas":
        mesh = init_device_mesh("cpu", (2, processes // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = DeviceMesh.from_group(group, "cpu")
    options: dict[str, Any] = {"mesh": mesh}
    if how == "columns":
        options["shard_placement_fn"] = column_shards(processes)
    if how == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if how == "mixed":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in (*getattr(model, "layers", ()), model):
        fully_shard(layer, **options)
    return model


def train(
    group: dist.ProcessGroup | None,
    name: str,
    how: str = "rows",
    accumulation: int = 1,
    **more: Any,
) -> dict[str, Any]:
    """Losses, ranks at every step, and bytes of a run; `group` is None for one process."""
    model = models.build(name)
    processes = 1 if group is None else dist.get_world_size(group)
    if group is not None:
        model = distribute(model, group, how)
    groups = arg_dist.param_groups(getattr(model, "module", model))
    optimizer = arg_dist.AdaRankGrad(groups, process_group=group, **SETTINGS)
    share = models.BATCH // processes
    first = 0 if group is None else dist.get_rank(group) * share
    losses, ranks = [], []
    for step in range(STEPS):
        total = torch.zeros(())
        for tokens in models.batch(step)[first : first + share].chunk(accumulation):
            loss = model(input_ids=tokens, labels=tokens).loss / accumulation
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if group is not None:
            dist.all_reduce(total, group=group)
        losses.append(total.item() / processes)
        ranks.append({entry["name"]: entry["rank"] for entry in optimizer.stats()})
    return {"losses": losses, "ranks": ranks, "state_bytes": optimizer.state_bytes()}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {name: train(None, name) for name in ("llama", "gpt2", "odd")}


@pytest.mark.parametrize(
    ("processes", "name", "how"),
    [(n, name, how) for how in HOW for n in (1, 2, 3, 4) for name in ("llama", "gpt2", "odd")]
    + [(2, "llama", "columns"), (4, "llama", "columns"), (4, "llama", "replicas")]
    + [(2, "llama", "offload")],
)
def test_training_cut_up_is_training_alone(pool, alone, processes, name, how):
    results = pool.run(train, processes, name, how, seconds=60)
    for result in results:
        LOSSES.check(torch.tensor(result["losses"]), torch.tensor(alone[name]["losses"]))
        for ours, theirs in zip(alone[name]["ranks"], result["ranks"], strict=True):
            assert theirs.items() <= ours.items()
    copies = 2 if how == "replicas" else 1
    held = sum(result["state_bytes"] for result in results)
    assert held <= 1.03 * copies * alone[name]["state_bytes"]


@pytest.mark.parametrize("how", HOW)
def test_accumulated_gradients_are_one_gradient(pool, alone, how):
    for result in pool.run(train, 2, "llama", how, 3, seconds=60):
        LOSSES.check(torch.tensor(result["losses"]), torch.tensor(alone["llama"]["losses"]))


def test_bf16_weights_in_the_forward_pass(pool, alone):
    for result in pool.run(train, 2, "llama", "mixed", seconds=60):
        ours = torch.tensor(alone["llama"]["losses"])
        LOW_PRECISION_LOSSES.check(torch.tensor(result["losses"]), ours)


def sent_between_refreshes(group: dist.ProcessGroup, how: str) -> int:
    """Low-rank bytes that process 0 sends in a step without a refresh, bases kept whole."""
    model = torch.nn.Linear(96, 48, bias=False)
    mesh = DeviceMesh.from_group(group, "cpu")
    placement = column_shards(2) if how == "columns" else None
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    optimizer = arg_dist.AdaRankGrad(model.parameters(), max_rank=8, shard_basis=False)
    sent = []
    for _ in range(3):
        model(torch.randn(4, 96)).sum().backward()
        before = optimizer.comm_bytes()
        optimizer.step()
        optimizer.zero_grad()
        sent.append(optimizer.comm_bytes() - before)
    assert sent[1] == sent[2]
    return sent[2]


def test_wide_matrices_cut_by_columns_send_nothing_between_refreshes(pool):
    agreement = 40  # two norms and three integers: whether to go on, which every step asks
    assert pool.run(sent_between_refreshes, 2, "columns") == [agreement] * 2
    assert all(sent > agreement for sent in pool.run(sent_between_refreshes, 2, "rows"))


def told(group: dist.ProcessGroup) -> str:
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    weight = distribute_tensor(torch.randn(8, 8), mesh, [Shard(0), Shard(1)])
    parameter = torch.nn.Parameter(weight)
    optimizer = arg_dist.AdaRankGrad([("both", parameter)], max_rank=2, min_rank=1)
    parameter.grad = weight
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def test_tensor_parallelism_is_refused_by_name(pool):
    assert all("both" in t and "tensor parallelism" in t for t in pool.run(told, 4))
