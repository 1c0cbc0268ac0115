"""Optimizers of several processes whose models are moved or reshaped, and that are copied."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from matrices import gaussian
from one_process import feed, parameters_of
from tolerances import REDUCTION_ORDER_WEIGHTS
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import arg_dist
from arg_dist import AdaRankGrad
from arg_dist.engines.fsdp2 import column_shards
from tests.pool.test_replicated_training import build, step_towards_zero

BEFORE, AFTER = 5, 7
SETTINGS = {"lr": 1e-2, "max_rank": 4, "min_rank": 2, "min_gap": 3, "max_gap": 4}


def sharded(group: dist.ProcessGroup, *, columns: bool) -> tuple[nn.Module, AdaRankGrad]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    placement = column_shards(dist.get_world_size(group)) if columns else None
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"), shard_placement_fn=placement)
    return model, AdaRankGrad(arg_dist.param_groups(model), **SETTINGS)


def trained_sharded(group: dist.ProcessGroup, columns: bool, moves: bool) -> list[Tensor]:
    """The weights after some steps; the model moves before the first one and around each."""
    model, optimizer = sharded(group, columns=columns)
    for step in range(8):
        if moves:
            model.cpu()
        optimizer.zero_grad()
        model(gaussian(4, 16, seed=step)).square().mean().backward()
        optimizer.step()
        if moves:
            model.to("cpu")  # with gradients
    return [parameter.full_tensor().detach() for parameter in model.parameters()]


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_sharded_model_may_be_moved_between_steps(pool, processes, columns):
    moved = pool.run(trained_sharded, processes, columns, True)
    stayed = pool.run(trained_sharded, processes, columns, False)
    for ours, theirs in zip(moved[0], stayed[0], strict=True):
        assert torch.equal(ours, theirs)


def copied_sharded(group: dist.ProcessGroup) -> list[str]:
    model, optimizer = sharded(group, columns=False)
    model(gaussian(4, 16)).square().mean().backward()
    optimizer.step()
    messages = []
    for duplicate in (copy.deepcopy, pickle.dumps, copy.copy):
        try:
            duplicate(optimizer)
        except RuntimeError as error:
            messages.append(str(error))
    return messages


def test_a_sharded_optimizer_is_not_copied(pool):
    for messages in pool.run(copied_sharded, 2):
        assert len(messages) == 2 and all("sharded" in message for message in messages)


def steps_on(optimizer: AdaRankGrad, first: int, count: int) -> list[Tensor]:
    for step in range(first, first + count):
        step_towards_zero(optimizer, step)
    return [weight.detach().clone() for weight in parameters_of(optimizer)]


def copied_replicated(group: dist.ProcessGroup) -> None:
    original = build(group)
    steps_on(original, 0, BEFORE)
    others = [copy.deepcopy(original)]
    original.process_group = "world"
    if dist.get_world_size(group) == dist.get_world_size():
        others += [pickle.loads(pickle.dumps(original)), copy.deepcopy(others[0])]
    original.process_group = group
    expected = steps_on(original, BEFORE, AFTER)
    for other in others:
        for ours, theirs in zip(expected, steps_on(other, BEFORE, AFTER), strict=True):
            assert torch.equal(ours, theirs)
        other.consolidate_state_dict()
        assert other.state_dict()["calls"] == original.calls == BEFORE + AFTER


@pytest.mark.parametrize("processes", [2, 4])
def test_copies_on_all_processes_train_on_together(pool, processes):
    pool.run(copied_replicated, processes)


def go_on(group: dist.ProcessGroup, optimizer: AdaRankGrad) -> list[Tensor]:
    optimizer.process_group = group
    return steps_on(optimizer, BEFORE, AFTER)


def test_a_pickle_of_one_process_may_go_on_with_several(pool):
    optimizer = build(None)
    steps_on(optimizer, 0, BEFORE)
    results = pool.run(go_on, 2, optimizer)
    expected = steps_on(optimizer, BEFORE, AFTER)
    for theirs in results:
        for mine, alone in zip(theirs, expected, strict=True):
            REDUCTION_ORDER_WEIGHTS.check(mine, alone)


def a_process_takes_anothers(group: dist.ProcessGroup) -> str:
    original = build("world")
    steps_on(original, 0, BEFORE)
    pickles: list[bytes] = [b""] * dist.get_world_size()
    dist.all_gather_object(pickles, pickle.dumps(original))
    with pytest.raises(RuntimeError) as caught:
        steps_on(pickle.loads(pickles[0]), BEFORE, 1)
    return str(caught.value)


def test_a_pickle_of_one_of_several_processes_is_for_that_one(pool):
    for message in pool.run(a_process_takes_anothers, 4):
        assert "the optimizer state of process 1, 2, 3 of 4 does not belong with" in message
        assert "it was loaded from another process" in message


def reshape(group: dist.ProcessGroup) -> str:
    optimizer = build(group, shapes=[(8, 6), (6, 8)])
    feed(optimizer, gaussian(8, 6), gaussian(6, 8))
    parameters_of(optimizer)[0].data = gaussian(9, 6)
    parameters_of(optimizer)[0].grad = None
    with pytest.raises(RuntimeError) as caught:
        feed(optimizer, gaussian(9, 6), gaussian(6, 8))
    optimizer.state.pop(parameters_of(optimizer)[0], None)
    feed(optimizer, gaussian(9, 6), gaussian(6, 8))
    return str(caught.value)


def test_a_reshaped_parameter_is_refused_on_all_processes(pool):
    for message in pool.run(reshape, 3):
        assert message.startswith("w0: after its last step it was given another shape")
