"""AdaRankGrad where every process has the whole model: the work and the state are shared out."""

from __future__ import annotations

import copy
import io
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from matrices import gaussian
from one_process import feed, parameters_of
from tolerances import REDUCTION_ORDER, REDUCTION_ORDER_WEIGHTS

from arg_dist import AdaRankGrad
from arg_dist.recording import rounds
from arg_dist.sharding.overlap import AT_ONCE

SHAPES = [(96, 48), (48, 96), (3, 48, 36), (31,)]
SETTINGS = {"lr": 1e-2, "max_rank": 12, "min_rank": 2, "energy": 0.8, "min_gap": 4, "max_gap": 8}
STEPS = 20


def build(group, shapes=SHAPES, names=None, **settings) -> AdaRankGrad:
    names = names or [f"w{i}" for i in range(len(shapes))]
    named = [
        (name, torch.nn.Parameter(gaussian(*shape, seed=i)))
        for i, (name, shape) in enumerate(zip(names, shapes, strict=True))
    ]
    return AdaRankGrad(named, process_group=group, **{**SETTINGS, **settings})


def gradients(shapes, step: int) -> list[torch.Tensor]:
    return [gaussian(*shape, seed=100 * step + i) for i, shape in enumerate(shapes)]


def step_towards_zero(optimizer: AdaRankGrad, step: int) -> float:
    """A step whose gradient depends on the weights; the loss before it."""
    weights = [weight.detach() for weight in parameters_of(optimizer)]
    noise = gradients([weight.shape for weight in weights], step)
    feed(optimizer, *(weight + 0.3 * each for weight, each in zip(weights, noise, strict=True)))
    return sum(float(weight.square().mean()) for weight in weights)


def train(group, settings):
    optimizer = build(group, **settings)
    losses = [step_towards_zero(optimizer, step) for step in range(STEPS)]
    weights = [weight.detach() for weight in parameters_of(optimizer)]
    ranks = {entry["name"]: entry["rank"] for entry in optimizer.stats()}
    return losses, weights, ranks, optimizer.state_bytes(), optimizer.comm_bytes()


@pytest.mark.parametrize(
    "settings",
    [{}, {"side": "right"}, {"weight_decay": 0.1}, {"residual": "scaled"}, {"residual": "none"}],
)
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_training_together_is_training_alone(pool, processes, settings):
    losses, weights, ranks, state_bytes, _ = train(None, settings)
    results = pool.run(train, processes, settings)
    for their_losses, their_weights, their_ranks, *_ in results:
        REDUCTION_ORDER.check(torch.tensor(their_losses), torch.tensor(losses))
        assert their_ranks == ranks
        for theirs, first, ours in zip(their_weights, results[0][1], weights, strict=True):
            assert torch.equal(theirs, first)
            REDUCTION_ORDER_WEIGHTS.check(theirs, ours)
    shares = [share for *_, share, _ in results]
    assert sum(shares) <= 1.03 * state_bytes
    assert max(shares) <= 1.05 * state_bytes / processes
    sent = [sent for *_, sent in results]
    assert all(sent) if processes > 1 else sent == [0]


def test_a_basis_that_is_not_cut_is_held_by_everyone(pool):
    *_, state_bytes, _ = train(None, {})
    results = pool.run(train, 2, {"shard_basis": False})
    assert sum(share for *_, share, _ in results) > 1.2 * state_bytes


def collectives_by_step(group, count: int) -> list[int]:
    optimizer = build(group, shapes=[(12, 8)] * count, max_rank=3, min_gap=5, max_gap=5)
    totals = [0]
    for step in range(8):
        step_towards_zero(optimizer, step)
        totals.append(optimizer.collectives())
    return [after - before for before, after in pairwise(totals)]


def test_the_number_of_collectives_does_not_depend_on_the_number_of_matrices(pool):
    steady, refreshing = (
        1 + count for count in rounds(power_passes=1, residual="orthogonalized", replicated=True)
    )
    expected = [refreshing] + 4 * [steady] + [refreshing] + 2 * [steady]
    for count in (4, 40):
        assert pool.run(collectives_by_step, 2, count) == [expected] * 2


LOAD = 4 * (3 * 12 + 12 * 8)
"""Bytes of a 12 x 8 matrix in a round: three columns of directions, and all of the residual."""


@pytest.mark.parametrize("size", [2 * LOAD, 2 * 3 * LOAD + 1])
def test_smaller_buckets_take_the_same_steps_in_more_collectives(pool, size):
    steady, refreshing = rounds(power_passes=1, residual="orthogonalized", replicated=True)
    count = 7
    lanes = -(-count // (size // (AT_ONCE * LOAD)))
    expected = [1 + lanes * refreshing] + 4 * [1 + lanes * steady]
    together, cut = (
        pool.run(steps_in_buckets, 2, count, {"bucket_size": given}) for given in (2**30, size)
    )
    for (_, weights), (collectives, same) in zip(together, cut, strict=True):
        assert collectives == expected
        assert all(map(torch.equal, weights, same))


def steps_in_buckets(group, count: int, settings) -> tuple[list[int], list[torch.Tensor]]:
    optimizer = build(group, [(12, 8)] * count, max_rank=3, min_gap=5, max_gap=5, **settings)
    totals = [0]
    for step in range(5):
        step_towards_zero(optimizer, step)
        totals.append(optimizer.collectives())
    weights = [weight.detach() for weight in parameters_of(optimizer)]
    return [after - before for before, after in pairwise(totals)], weights


def collectives_with_one_new_basis(group, count: int, settings) -> int:
    optimizer = build(group, [(12, 8)] * count, max_rank=3, min_gap=99, max_gap=99, **settings)
    step_towards_zero(optimizer, 0)
    before = optimizer.collectives()
    for parameter in parameters_of(optimizer)[:1]:
        for state in optimizer.state[parameter].values():
            state["gap"] = 0
    step_towards_zero(optimizer, 1)
    return optimizer.collectives() - before


def test_only_a_lane_that_looks_for_a_basis_takes_the_rounds_of_a_refresh(pool):
    steady, refreshing = rounds(power_passes=1, residual="orthogonalized", replicated=True)
    a_lane_each = {"bucket_size": AT_ONCE * LOAD}
    expected = 1 + refreshing + 3 * steady
    assert pool.run(collectives_with_one_new_basis, 2, 4, a_lane_each) == [expected] * 2


def one_differs(group, difference) -> str:
    """The error where process 1 was started with something else."""
    optimizer = build(group, **(difference if dist.get_rank(group) == 1 else {}))
    shapes = [parameter.shape for parameter in parameters_of(optimizer)]
    with pytest.raises(RuntimeError) as raised:
        feed(optimizer, *gradients(shapes, 0))
    return str(raised.value)


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ({"max_rank": 6}, ["settings of parameter group 0", "max_rank=12", "max_rank=6"]),
        ({"bucket_size": 99}, ["settings of parameter group 0", "bucket_size=536870912", "=99"]),
        ({"seed": 1}, ["settings of parameter group 0", "seed=0", "seed=1"]),
        ({"shapes": [(96, 48), *SHAPES[:1], *SHAPES[2:]]}, ["w1 (48, 96)", "w1 (96, 48)"]),
        ({"names": ["w0", "w1", "w2", "v"]}, ["w3 (31,)", "v (31,)"]),
        ({"shapes": SHAPES[:2]}, ["number of parameters in group 0", "has 4", "has 2"]),
    ],
)
def test_a_process_started_differently_is_an_error_on_all(pool, difference, words):
    for message in pool.run(one_differs, 3, difference, seconds=10):
        assert all(word in message for word in ["process 1 has", *words])


def one_has_nan(group, nonfinite: str):
    """Weights and state before and after a step with NaN on the last process only; the error."""
    optimizer = build(group, nonfinite=nonfinite)
    for step in range(3):
        step_towards_zero(optimizer, step)
    before = [weight.detach().clone() for weight in parameters_of(optimizer)]
    state_before = copy.deepcopy([optimizer.state[weight] for weight in parameters_of(optimizer)])
    broken = gradients(SHAPES, 9)
    if dist.get_rank(group) == dist.get_world_size(group) - 1:
        broken[1].fill_(float("nan"))
    message = ""
    try:
        feed(optimizer, *broken)
    except FloatingPointError as error:
        message = str(error)
    after = [weight.detach() for weight in parameters_of(optimizer)]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    state_after = [optimizer.state[weight] for weight in parameters_of(optimizer)]
    torch.testing.assert_close(state_after, state_before, rtol=0, atol=0)
    return message, optimizer.skipped_steps


@pytest.mark.parametrize("processes", [2, 4])
def test_nan_on_one_process_is_an_error_on_all_and_changes_nothing(pool, processes):
    for message, _ in pool.run(one_has_nan, processes, "error", seconds=10):
        assert "the gradient of w1 is NaN or infinite" in message


def test_nan_on_one_process_is_skipped_by_all(pool):
    assert pool.run(one_has_nan, 3, "skip", seconds=10) == [("", 1)] * 3


def checkpoint(optimizer, group, to: int = 0):
    """What process `to` saves, as all processes read it from a file."""
    optimizer.consolidate_state_dict(to)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    saved = [file.getvalue()]
    if group is not None:
        dist.broadcast_object_list(saved, group=group, group_src=to)
    return torch.load(io.BytesIO(saved[0]), weights_only=True)


def copy_weights(ours, theirs):
    for our, their in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        our.data.copy_(their.data)


def go_on_from_a_checkpoint(group, settings, to) -> None:
    straight, first = build(group, **settings), build(group, **settings)
    for step in range(6):
        step_towards_zero(straight, step)
        step_towards_zero(first, step)
    second = build(group, **settings)
    copy_weights(second, first)
    second.load_state_dict(checkpoint(first, group, to))
    for step in range(6, 14):
        step_towards_zero(straight, step)
        step_towards_zero(second, step)
    assert all(map(torch.equal, parameters_of(second), parameters_of(straight)))
    assert second.state_bytes() == straight.state_bytes()


@pytest.mark.parametrize(
    ("settings", "to"), [({}, 0), ({"shard_basis": False}, 2), ({"preset": "pretraining"}, 1)]
)
def test_a_run_that_one_process_saved_and_all_loaded_goes_on_to_the_bit(pool, settings, to):
    pool.run(go_on_from_a_checkpoint, 3, settings, to)


def save_after_six_steps(group):
    optimizer = build(group)
    for step in range(6):
        step_towards_zero(optimizer, step)
    weights = [weight.detach().clone() for weight in parameters_of(optimizer)]
    return checkpoint(optimizer, group), weights


def go_on_from(group, saved, weights):
    optimizer = build(group)
    for ours, theirs in zip(parameters_of(optimizer), weights, strict=True):
        ours.data.copy_(theirs)
    optimizer.load_state_dict(saved)
    losses = [step_towards_zero(optimizer, step) for step in range(6, 14)]
    return losses, {entry["name"]: entry["rank"] for entry in optimizer.stats()}


@pytest.mark.parametrize(("before", "after"), [(3, 2), (1, 4), (4, 1)])
def test_a_run_goes_on_with_another_number_of_processes(pool, before, after):
    expected, ranks = go_on_from(None, *save_after_six_steps(None))
    saved, weights = pool.run(save_after_six_steps, before)[0]
    for losses, some_ranks in pool.run(go_on_from, after, saved, weights):
        REDUCTION_ORDER.check(torch.tensor(losses), torch.tensor(expected))
        assert some_ranks == ranks


def save_what_is_not_whole(group) -> str:
    optimizer = build(group)
    optimizer.state_dict()  # there is nothing to lose yet
    step_towards_zero(optimizer, 0)
    optimizer.consolidate_state_dict()
    step_towards_zero(optimizer, 1)  # outdates it
    with pytest.raises(RuntimeError) as raised:
        optimizer.state_dict()
    return str(raised.value)


def test_a_process_does_not_save_a_part_as_if_it_were_everything(pool):
    for message in pool.run(save_what_is_not_whole, 2):
        assert "consolidate_state_dict() on every process" in message


def load_what_another_process_was_left_with(group) -> str:
    first, second = build(group), build(group)
    step_towards_zero(first, 0)
    first.consolidate_state_dict()
    second.load_state_dict(first.state_dict())  # process 1 has none
    with pytest.raises(RuntimeError) as raised:
        step_towards_zero(second, 1)
    return str(raised.value)


def test_a_state_that_lies_elsewhere_is_refused(pool):
    messages = pool.run(load_what_another_process_was_left_with, 2)
    assert messages[0] == messages[1] and "process 1" in messages[0]


def told_of(action, group) -> str:
    try:
        action(group)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def train_another_model(group) -> str:
    """Each process builds weights of its own, as when nobody broadcast them."""

    def action(group):
        weight = torch.nn.Parameter(gaussian(8, 6, seed=dist.get_rank(group)))
        feed(AdaRankGrad([("w", weight)], max_rank=2, min_rank=1, process_group=group), weight)

    return told_of(action, group)


def test_other_weights_on_another_process_are_an_error_on_all(pool):
    for message in pool.run(train_another_model, 2):
        assert "w: the weights of process 1 of the group differ" in message
        assert "process_group=None" in message


def load_on_one_process_only(group) -> str:
    def action(group):
        first, second = build(group), build(group)
        step_towards_zero(first, 0)
        saved = checkpoint(first, group)
        if dist.get_rank(group) == 0:
            second.load_state_dict(saved)
        step_towards_zero(second, 1)

    return told_of(action, group)


def test_state_loaded_on_one_process_only_is_an_error_on_all(pool):
    assert all("another step" in message for message in pool.run(load_on_one_process_only, 2))


def test_a_process_group_is_a_group_world_or_none(pool):
    def action(_):
        step_towards_zero(build("none"), 0)

    assert "'none'" in told_of(action, None)


def train_under_fsdp1(group) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    def action(group):
        model = FullyShardedDataParallel(
            torch.nn.Linear(8, 6), process_group=group, device_id=torch.device("cpu")
        )
        optimizer = AdaRankGrad(model.parameters(), process_group=group)
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()

    return told_of(action, group)


def test_fsdp1_is_refused_by_name(pool):
    for message in pool.run(train_under_fsdp1, 2):
        assert "FSDP1" in message and "fully_shard" in message
