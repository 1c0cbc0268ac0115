"""Processes that share a model's work have equal gradients, weights and settings, or an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from matrices import gaussian
from one_process import feed, parameters_of
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import arg_dist
from arg_dist import AdaRankGrad
from arg_dist.equality import COPIES_EVERY
from arg_dist.subspace import fingerprint, norms
from arg_dist.subspace.fingerprint import TOLERANCE
from tests.unit.test_host_reads import READS

SHAPES = [(24, 16), (16, 24), (2, 8, 12), (9,)]
NAMES = ["wide", "tall", "experts", "bias"]
SETTINGS = {
    "lr": 1e-2,
    "max_rank": 4,
    "min_rank": 2,
    "min_gap": 3,
    "max_gap": 6,
    "collective_timeout": 15,
}
MANY = 8
"""More tensors than are compared by turns in a step."""
Tensors = list[torch.Tensor]


def build(group: Any, count: int = 1) -> AdaRankGrad:
    named = [
        (f"{name}{i or ''}", nn.Parameter(gaussian(*shape, seed=i)))
        for i in range(count)
        for name, shape in zip(NAMES, SHAPES, strict=True)
    ]
    return AdaRankGrad(named, process_group=group, **SETTINGS)


def gradients(optimizer: AdaRankGrad, step: int) -> list[torch.Tensor | None]:
    shapes = [parameter.shape for parameter in parameters_of(optimizer)]
    return [gaussian(*shape, seed=50 * step + i) for i, shape in enumerate(shapes)]


def told(action: Callable[[], object]) -> str:
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return ""


def flipped(gradient: torch.Tensor) -> torch.Tensor:
    gradient[0] *= -1
    return gradient


DIFFERENCES: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor | None]]] = {
    "other": (0, lambda gradient: gaussian(*gradient.shape, seed=9)),
    "sign": (1, torch.neg),
    "sign of a row": (0, flipped),
    "rows in another order": (1, lambda gradient: gradient.flip(0)),
    "scaled": (2, lambda gradient: gradient.mul(2)),
    "none": (0, lambda gradient: None),
    "zero": (3, torch.zeros_like),
    "full-rank": (3, lambda gradient: gradient.add(0.01)),
    "constant": (1, lambda gradient: torch.full_like(gradient, -0.1)),
}


def one_differs(group: Any, kind: str, at: int) -> tuple[str, bool]:
    """The error of a step in which process 1 has another gradient; whether it changed anything."""
    optimizer = build(group)
    for step in range(at):
        feed(optimizer, *gradients(optimizer, step))
    which, change = DIFFERENCES[kind]
    given = gradients(optimizer, at)
    if kind == "constant":
        given[which] = torch.full_like(given[which], 0.1)
    if dist.get_rank(group) == 1:
        given[which] = change(given[which])
    before = copy.deepcopy([parameters_of(optimizer), list(optimizer.state.values())])
    message = told(lambda: feed(optimizer, *given))
    after = [parameters_of(optimizer), list(optimizer.state.values())]
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    torch.testing.assert_close(
        [state for state in after[1] if any(state.values())],
        [state for state in before[1] if any(state.values())],
        rtol=0,
        atol=0,
    )
    return message, optimizer.calls == at


@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("kind", DIFFERENCES)
def test_another_gradient_on_a_process_is_an_error_on_all_and_changes_nothing(pool, kind, at):
    results = pool.run(one_differs, 3, kind, at)
    message = results[0][0]
    assert results == [(message, True)] * 3
    name = NAMES[DIFFERENCES[kind][0]]
    assert message.startswith(f"{name}") and "the gradient of process 1 of the group" in message
    assert f"at step {at}" in message and "process_group=None" in message
    assert ("process 1 has none" in message) == (kind == "none")
    assert all(word in message for word in ("no_sync", "local SGD", "DistributedDataParallel"))


def one_of_many_differs(group: Any) -> list[str]:
    """The errors while one of many tensors always has another gradient on process 1."""
    optimizer = build(group, MANY)
    for step in range(4):
        feed(optimizer, *gradients(optimizer, step))
    found = []
    for step in range(4, 4 + len(parameters_of(optimizer))):
        given = gradients(optimizer, step)
        if dist.get_rank(group) == 1:
            given[-1] = given[-1] + 1.0
        found.append(told(lambda given=given: feed(optimizer, *given)))
        if found[-1]:
            break
    return found


def test_every_tensor_has_its_turn(pool):
    for found in pool.run(one_of_many_differs, 2):
        assert found[-1].startswith(f"bias{MANY - 1}: the gradient of process 1")


def rounded_differently(group: Any) -> str:
    """Gradients that were clipped by norms with other last bits."""
    optimizer = build(group)

    def train():
        for step in range(8):
            factor = 1 + TOLERANCE / 100 * dist.get_rank(group)
            feed(optimizer, *(each * factor for each in gradients(optimizer, step)))

    return told(train)


def test_the_last_bits_of_a_gradient_may_differ(pool):
    assert pool.run(rounded_differently, 2) == ["", ""]


def reads_of_a_steady_step(group: Any) -> list[str]:
    """The reads of tensors in a step without a refresh, on a device where each of them waits."""
    optimizer, seen = build(group), []
    with pytest.MonkeyPatch.context() as patch:
        for module in (norms, fingerprint):
            patch.setattr(module, "in_host_memory", lambda part: False)
        for name in READS:
            patch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name), name, seen))
        for step in range(3):
            seen.clear()
            feed(optimizer, *gradients(optimizer, step))
    return seen


def counted(method: Any, name: str, seen: list[str]) -> Any:
    def read(self: torch.Tensor, *args: object) -> object:
        seen.append(name)
        return method(self, *args)

    return read


def test_comparing_makes_no_step_wait_for_the_device_once_more(pool):
    assert pool.run(reads_of_a_steady_step, 2) == [["tolist", "tolist"]] * 2


def one_drifts(group: Any) -> str:
    optimizer = build(group)
    for step in range(3):
        feed(optimizer, *gradients(optimizer, step))
    if dist.get_rank(group) == 2:
        parameters_of(optimizer)[3].data.mul_(1.01)
    return told(lambda: feed(optimizer, *gradients(optimizer, 3)))


def test_weights_changed_on_one_process_are_an_error_on_all(pool):
    for message in pool.run(one_drifts, 3):
        assert message.startswith("bias: the weights of process 2 of the group differ")


def one_has_another_rate(group: Any, engine: str) -> str:
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(16, 24)
    if engine == "rows":
        mesh = init_device_mesh("cpu", (dist.get_world_size(group),))
        fully_shard(model, mesh=mesh)
    optimizer = AdaRankGrad(arg_dist.param_groups(model), process_group=group, **SETTINGS)

    def step():
        optimizer.zero_grad()
        model(torch.ones(2, 16)).square().mean().backward()
        optimizer.step()

    step()
    if dist.get_rank(group) == 1:
        optimizer.param_groups[-1]["lr"] /= 2
    return told(step)


@pytest.mark.parametrize("engine", ["replicated", "rows"])
def test_another_learning_rate_on_a_process_is_an_error_on_all(pool, engine):
    for message in pool.run(one_has_another_rate, 4, engine):
        assert message.startswith("the settings of parameter group 1 differ at step 1")
        assert "process 0 of the group has lr=0.01, process 1 has lr=0.005" in message


def one_has_other_state(group: Any) -> str:
    optimizer = build(group)
    feed(optimizer, *gradients(optimizer, 0))
    if dist.get_rank(group) == 1:
        optimizer.state[parameters_of(optimizer)[0]]["wide"]["gap"] = 1
    return told(lambda: feed(optimizer, *gradients(optimizer, 1)))


def test_state_that_refreshes_elsewhere_is_an_error_on_all(pool):
    for message in pool.run(one_has_other_state, 3):
        assert message.startswith("wide: is due for a new basis on one of processes 0 and 1")


class Net(nn.Module):
    """Two layers, of which one may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor, both: bool = True) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        return x + self.second(x) if both else x


class Trained:
    """A net under DDP in the way of `how`, each process with data of its own."""

    def __init__(self, group: Any, how: str, shared: bool = True) -> None:
        torch.manual_seed(0)
        self.net, self.how, self.group = Net(), how, group
        options: dict[str, Any] = {
            "find_unused_parameters": how.startswith("unused"),
            "static_graph": how == "static graph",
        }
        if how == "ignored":
            self.net._ddp_params_and_buffers_to_ignore = ["second.weight"]
        self.model: nn.Module = self.net
        if how != "no DDP":
            self.model = DistributedDataParallel(self.net, process_group=group, **options)
        self._compress()
        self.optimizer = AdaRankGrad(
            arg_dist.param_groups(self.model), process_group=group if shared else None, **SETTINGS
        )

    def _compress(self) -> None:
        group = self.group
        if self.how == "fp16":
            self.model.register_comm_hook(group, default_hooks.fp16_compress_hook)
        elif self.how == "PowerSGD":
            state = powerSGD_hook.PowerSGDState(group, 2, start_powerSGD_iter=3)
            self.model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        elif self.how == "post_localSGD":
            alone = [dist.new_group([i]) for i in range(dist.get_world_size())]
            state = PostLocalSGDState(group, alone[dist.get_rank()], start_localSGD_iter=3)
            self.model.register_comm_hook(state, post_localSGD_hook)

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        me = dist.get_rank(self.group)
        model = self.net if self.how == "around DDP" and step > 2 else self.model
        for micro in range(2 if self.how == "accumulated" else 1):
            x = gaussian(4, 16, seed=10 * step + me + 100 * micro)
            both = self.how != "unused on one" or me == 0
            both &= self.how != "unused on all" or step % 2 == 0
            alone = self.how == "no_sync" or (self.how == "accumulated" and micro == 0)
            with self.model.no_sync() if alone else nullcontext():
                model(x, both).sub(me).square().mean().backward()
        self.optimizer.step()


def train_in_this_way(group: Any, how: str, shared: bool) -> tuple[str, int, Tensors]:
    mine = Trained(group, how, shared)
    message = told(lambda: [mine.step(step) for step in range(8)])
    weights = [parameter.detach() for parameter in mine.net.parameters()]
    return message, mine.optimizer.calls, weights


EQUAL = [
    "plain",
    "accumulated",
    "fp16",
    "PowerSGD",
    "static graph",
    "unused on one",
    "unused on all",
]


@pytest.mark.parametrize("how", EQUAL)
def test_gradients_that_ddp_makes_equal_train_one_model(pool, how):
    results = pool.run(train_in_this_way, 2, how, True)
    for message, _, weights in results:
        assert message == ""
        assert all(map(torch.equal, weights, results[0][2]))


EVERYONE = 4
"""The whole pool: new groups are made by all of its processes."""
APART = {"no DDP": 0, "ignored": 0, "no_sync": 0, "around DDP": 3, "post_localSGD": 3}


@pytest.mark.parametrize(("how", "begins"), APART.items())
def test_gradients_of_each_process_alone_are_an_error_in_the_first_such_step(pool, how, begins):
    results = pool.run(train_in_this_way, EVERYONE, how, True)
    message, steps, _ = results[0]
    assert [each[:2] for each in results] == [(message, steps)] * EVERYONE
    assert "the gradient of process 1, 2, 3 of the group differs" in message
    assert begins <= steps <= begins + 1


def train_alone(group: Any, how: str) -> list[Tensors]:
    """What local SGD trains, and what a process by itself does on the same gradients."""
    shared = Trained(group, how, shared=False)
    alone = build_alone(shared)
    for step in range(8):
        shared.step(step)
        for ours, theirs in zip(alone[0].parameters(), shared.net.parameters(), strict=True):
            ours.grad = theirs.grad.clone()
        alone[1].step()
    return [[each.detach() for each in net.parameters()] for net in (shared.net, alone[0])]


def build_alone(shared: Trained) -> tuple[nn.Module, AdaRankGrad]:
    net = copy.deepcopy(shared.net)
    return net, AdaRankGrad(arg_dist.param_groups(net), process_group=None, **SETTINGS)


@pytest.mark.parametrize("how", ["no_sync", "post_localSGD", "no DDP"])
def test_without_a_process_group_each_process_trains_on_its_own_gradient(pool, how):
    for together, alone in pool.run(train_alone, EVERYONE, how):
        assert all(map(torch.equal, together, alone))


def copies_of_a_sharded_model(group: Any, what: str) -> tuple[str, int]:
    """Two copies of a model, each cut over two processes; something happens to one of them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
    fully_shard(net, mesh=mesh)
    optimizer = AdaRankGrad(arg_dist.param_groups(net), **SETTINGS)
    me = dist.get_rank(group)

    def train() -> None:
        for step in range(COPIES_EVERY + 2):
            optimizer.zero_grad()
            net(gaussian(4, 16, seed=4 * step + me)).square().mean().backward()
            changed = net[1].weight.grad if what == "gradient" else net[1].weight
            if what and step == (0 if what == "gradient" else 3) and me == 3:
                with torch.no_grad():
                    changed.to_local().add_(0.1)
            optimizer.step()

    return told(train), optimizer.calls


@pytest.mark.parametrize("what", ["", "gradient", "weights"])
def test_copies_of_a_sharded_model_are_compared(pool, what):
    results = pool.run(copies_of_a_sharded_model, 4, what, seconds=40)
    steps = {"": COPIES_EVERY + 2, "gradient": 0, "weights": COPIES_EVERY}[what]
    assert [calls for _, calls in results] == [steps] * 4
    for message, _ in results:
        assert not what or message.startswith("1.weight: processes 1 and 3 of the job")
        assert bool(message) == bool(what) and what in message
