"""PyTorch's own engines give what one process gives: FSDP2, cut in any way, and DDP."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import arg_dist
from arg_dist.engines.fsdp2 import column_shards
from arg_dist.library_internals import TORCH
from arg_dist.telemetry import ADAMW_BYTES_PER_ELEMENT, sample_optimizer
from tests.launch import models, torch_engines, training
from tests.launch.cases import MOMENTUM
from tests.tolerances import CODES_LOSSES, LOSSES, LOW_PRECISION_LOSSES

HOW = ("ROWS", "DDP")


def train(
    group: dist.ProcessGroup,
    name: str,
    engine: str,
    micro_batches: tuple[int, ...] = (1,),
    sends_each: bool = False,
) -> training.Run:
    """What a process sees under one of ``torch_engines``, and what it holds."""
    mine = getattr(torch_engines, engine).start(group, name)
    mine.sends_each = sends_each
    run = training.train(mine, micro_batches, group=group)
    return {**run, "state_bytes": mine.optimizer.state_bytes()}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    runs = {}
    for name in ("llama", "gpt2", "odd", "moe"):
        mine = training.one_process(name)
        runs[name] = {**training.train(mine), "state_bytes": mine.optimizer.state_bytes()}
    return runs


def train_with_momentum(group: dist.ProcessGroup, engine: str) -> training.Run:
    """The same with momentum of the residual."""
    return training.train(getattr(torch_engines, engine).start(group, **MOMENTUM), group=group)


@pytest.mark.parametrize(
    ("processes", "engine"), [(3, "ROWS"), (2, "COLUMNS"), (4, "HSDP"), (3, "DDP")]
)
def test_momentum_is_that_of_one_process(pool, alone_with_momentum, processes, engine):
    results = pool.run(train_with_momentum, processes, engine, seconds=60)
    training.check(results, alone_with_momentum, CODES_LOSSES)


@pytest.fixture(scope="module")
def alone_with_momentum() -> training.Run:
    return training.train(training.one_process("llama", **MOMENTUM))


@pytest.mark.parametrize(
    ("processes", "name", "engine"),
    [(n, name, how) for how in HOW for n in (1, 2, 3, 4) for name in ("llama", "odd")]
    + [(2, "gpt2", "ROWS"), (2, "gpt2", "DDP")]
    + [(2, "moe", "ROWS"), (3, "moe", "ROWS"), (2, "moe", "DDP"), (2, "moe", "COLUMNS")]
    + [(2, "llama", "COLUMNS"), (4, "llama", "COLUMNS"), (4, "llama", "HSDP")]
    + [(2, "llama", "OFFLOAD"), (4, "llama", "OFFLOAD")]
    + [(2, "llama", "DDP_STATIC"), (2, "llama", "DDP_VIEWS"), (4, "llama", "DDP_STATIC_VIEWS")],
)
def test_training_cut_up_is_training_alone(pool, alone, processes, name, engine):
    results = pool.run(train, processes, name, engine, seconds=60)
    training.check(results, alone[name], LOSSES)
    copies = 2 if engine == "HSDP" else 1
    held = sum(result["state_bytes"] for result in results)
    assert held <= 1.03 * copies * alone[name]["state_bytes"]


@pytest.mark.parametrize("engine", HOW)
def test_accumulated_gradients_are_one_gradient(pool, alone, engine):
    results = pool.run(train, 2, "llama", engine, (3,), True, seconds=60)
    training.check(results, alone["llama"], LOSSES)


@pytest.mark.parametrize("engine", ["ROWS", "COLUMNS", "HSDP", "OFFLOAD", "DDP", "DDP_VIEWS"])
def test_gradients_sent_with_the_last_micro_batch_only(pool, alone, engine):
    processes = 4 if engine == "HSDP" else 2
    results = pool.run(train, processes, "llama", engine, (1, 3, 2), seconds=60)
    training.check(results, alone["llama"], LOSSES)


@pytest.mark.parametrize(
    "engine", ["DDP_BF16", "DDP_FP16", "ROWS_BF16", "ROWS_FP16", "ROWS_FP16_AUTOCAST"]
)
def test_low_precision_of_products_comes_near_to_fp32(pool, alone, engine):
    results = pool.run(train, 2, "llama", engine, seconds=60)
    training.check(results, alone["llama"], LOW_PRECISION_LOSSES, ranks=False)


@pytest.mark.parametrize("engine", ["DDP_BF16_WEIGHTS", "ROWS_BF16_WEIGHTS"])
def test_bf16_weights_are_trained_as_by_one_process(pool, engine):
    alone = training.train(training.one_process("llama", torch.bfloat16))
    results = pool.run(train, 4, "llama", engine, seconds=60)
    training.check(results, alone, LOW_PRECISION_LOSSES, ranks=False)


def one_overflows(group: dist.ProcessGroup, engine: str) -> dict[str, Any]:
    """Steps of which one has an infinite gradient element in one process's share of the batch."""
    mine = getattr(torch_engines, engine).start(group)
    me, share = dist.get_rank(group), models.BATCH // dist.get_world_size(group)
    overflows = False

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[0, 0, 0] = float("inf")
        return gradient

    def watch(module: Any, inputs: Any, output: torch.Tensor) -> None:
        if overflows:
            output.register_hook(overflow)

    plain = getattr(mine.model, "module", mine.model)
    plain.get_input_embeddings().register_forward_hook(watch)
    seen: dict[str, Any] = {"scales": [], "moved": [], "losses": [], "ranks": []}
    for step in range(6):
        overflows = step == 3 and me == 1
        before = [local(parameter).clone() for parameter in plain.parameters()]
        tokens = models.batch(step)[me * share : (me + 1) * share]
        loss = mine.micro_step(tokens, 1.0, last=True).detach()
        dist.all_reduce(loss, group=group)
        after = [local(parameter) for parameter in plain.parameters()]
        seen["moved"].append(not all(map(torch.equal, before, after)))
        seen["scales"].append(mine.scaler.get_scale())
        seen["losses"].append(loss.item())
        seen["ranks"].append(training.ranks_now(mine.optimizer))
    return seen


def local(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter."""
    return parameter.detach().to_local() if hasattr(parameter, "to_local") else parameter.detach()


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("engine", ["DDP_FP16", "ROWS_FP16"])
def test_an_overflow_on_one_process_skips_the_step_on_all(pool, processes, engine):
    results = pool.run(one_overflows, processes, engine)
    scale = torch_engines.SCALE
    for seen in results:
        assert seen["moved"] == [True, True, True, False, True, True]
        assert seen["scales"] == [scale] * 3 + [scale / 2] * 3
        assert seen["losses"] == results[0]["losses"]
        assert torch.tensor(seen["losses"]).isfinite().all()
        assert seen["ranks"][3] == seen["ranks"][2]


def adamw_bytes(group: dist.ProcessGroup) -> tuple[list[int], int]:
    model = torch_engines.ROWS.distribute(models.build("llama"), group)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=models.batch(0), labels=models.batch(0)).loss.backward()
    optimizer.step()
    held = sum(local(parameter).numel() for parameter in model.parameters())
    return sample_optimizer(optimizer).state_bytes, ADAMW_BYTES_PER_ELEMENT * held


def test_each_process_tells_what_it_holds_of_adamws_state(pool):
    results = pool.run(adamw_bytes, 4, seconds=60)
    held = [mine for _, mine in results]
    assert [told_by_all for told_by_all, _ in results] == [held] * 4


def sent_between_refreshes(group: dist.ProcessGroup, how: str) -> int:
    """Low-rank bytes that process 0 sends in a step without a refresh, bases kept whole."""
    model = torch.nn.Linear(96, 48, bias=False)
    mesh = DeviceMesh.from_group(group, "cpu")
    placement = column_shards(2) if how == "columns" else None
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    optimizer = arg_dist.AdaRankGrad(
        model.parameters(), max_rank=8, shard_basis=False, residual="matched"
    )
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


def step_where_torch_adds_up(group: dist.ProcessGroup) -> str:
    model = torch.nn.Linear(6, 4)
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    optimizer = arg_dist.AdaRankGrad(model.parameters())
    model(torch.ones(2, 6)).sum().backward()
    with (
        mock.patch.dict(TORCH.__dict__, installed="2.8.0+cpu"),
        pytest.raises(RuntimeError) as told,
    ):
        optimizer.step()
    return str(told.value)


def test_an_old_torch_that_adds_up_gradients_over_gloo_is_refused(pool):
    for message in pool.run(step_where_torch_adds_up, 2):
        assert ": is a DTensor on a mesh of CPUs (gloo), where torch 2.8.0+cpu" in message
