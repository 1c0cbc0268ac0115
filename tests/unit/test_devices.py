"""Messages of groups on accelerators: their device, one copy each; scalars of several devices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from arg_dist.sharding import message_device as devices
from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.fragment import Fragment, Holding
from arg_dist.sharding.job import job_communicator
from arg_dist.sharding.message_device import message_device
from arg_dist.sharding.message_packing import Messages
from arg_dist.sharding.transfers import moved_together
from arg_dist.step import agree
from arg_dist.subspace.distributed import Exchange, even_rows
from tests.installed import IN_PYTHON

CPU, META = torch.device("cpu"), torch.device("meta")


def on(*places: str) -> list[Holding]:
    """Fragments on these devices."""
    targets = [SimpleNamespace(device=torch.device(place)) for place in places]
    fragments = [
        Fragment(f"w{i}", (4,), 0, 4, target, lambda t: t)  # type: ignore[arg-type]
        for i, target in enumerate(targets)
    ]
    return [Holding(fragments, None)]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A host that seems to have four GPUs, and the process's current one."""
    host = SimpleNamespace(current=0)
    module = SimpleNamespace(current_device=lambda: host.current)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    monkeypatch.setattr(devices.dist, "get_backend", lambda group: group.backend)
    return host


def group(bound: str | None = None, backend: str = "nccl") -> SimpleNamespace:
    return SimpleNamespace(
        backend=backend, bound_device_id=None if bound is None else torch.device(bound)
    )


@pytest.mark.parametrize(
    ("bound", "fragments", "known", "expected"),
    [
        ("cuda:2", [], None, "cuda:2"),
        ("cuda:2", ["cpu"], None, "cuda:2"),
        ("cuda:2", ["cuda:1", "cuda:2"], None, "cuda:2"),
        (None, ["cuda:3"], None, "cuda:3"),
        (None, ["cpu", "cuda:3", "cuda:1"], None, "cuda:3"),
        (None, [], "cuda:2", "cuda:2"),
        (None, ["cpu"], "cpu", "cuda:1"),
        (None, [], None, "cuda:1"),
    ],
)
def test_messages_pass_through_the_device_of_the_group_or_of_the_weights(
    gpus, bound, fragments, known, expected
):
    gpus.current = 1
    known = None if known is None else torch.device(known)
    found = message_device(group(bound), on(*fragments), known)
    assert found == torch.device(expected)


def test_messages_of_gloo_stay_on_the_host(gpus):
    assert message_device(group("cuda:1", "gloo"), on("cuda:1")) == CPU


def test_weights_elsewhere_than_the_group_are_refused_by_name(gpus):
    with pytest.raises(RuntimeError, match=r"bound to cuda:2, but w0 is on cuda:0; move the"):
        message_device(group("cuda:2"), on("cuda:0"))


def test_the_first_device_is_never_taken_because_nobody_has_set_one(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RuntimeError, match=r"process 2 of this host .* torch.cuda.set_device\(2\)"):
        message_device(group(), on("cpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)  # each sees its own alone
    assert message_device(group(), on("cpu")) == torch.device("cuda:0")


@pytest.fixture
def fake_job():
    """A process of a job of two whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.skipif(not IN_PYTHON, reason="torch 2.7 has no process groups in Python")
def test_a_communicator_packs_on_the_device_of_its_fragments(fake_job, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: META)
    backend = fake_job._get_backend(CPU)
    monkeypatch.setattr(dist.ProcessGroup, "_get_backend", lambda group, device: backend)
    communicator = Communicator(fake_job, holdings=on("meta"))
    rows = even_rows(4, 2)
    part = torch.empty(2, 3, device="meta")
    (answer,) = communicator.exchange([Exchange(part, rows, ((0, 4),) * 2)])
    assert communicator.device == answer.device == META and answer.shape == (4, 3)
    plan = SimpleNamespace(communicator=communicator, replicated=False, held=[])
    assert job_communicator("world", [plan]).device == META


class Copies(TorchDispatchMode):
    """Counts copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name == "_to_copy" and result.device != args[0].device:
            self.count += 1
        if name == "copy_" and args[0].device != args[1].device:
            self.count += 1
        return result


def exchanges(count: int, *places: torch.device) -> list[Exchange]:
    """Requests of process 0 of 2 for parts that are on these devices, in turns."""
    rows, odd = even_rows(6, 2), (1, 3, 2)
    return [
        Exchange(torch.ones(3, odd[i % 3], device=places[i % len(places)]), rows, ((0, 6),) * 2)
        for i in range(count)
    ]


def test_offloaded_parts_are_copied_once_a_message():
    messages = Messages(exchanges(12, CPU), 0, 2, META)
    with Copies() as copies:
        sent = messages.packed()
    assert copies.count == 1 and sent.device == META
    assert sent.numel() == sum(messages.send_sizes)


def test_answers_are_copied_once_to_each_device():
    messages = Messages(exchanges(12, META), 0, 2, CPU)
    received = torch.zeros(sum(messages.receive_sizes), dtype=messages.dtype)
    with Copies() as copies:
        answers = messages.answers(received)
    assert copies.count == 1 and {answer.device for answer in answers} == {META}
    mixed = Messages(exchanges(12, META, CPU), 0, 2, CPU)
    with Copies() as copies:
        answers = mixed.answers(received)
    assert copies.count == 1
    assert [answer.device for answer in answers] == [META, CPU] * 6


def test_tensors_of_several_devices_are_moved_by_one_copy_and_keep_their_order():
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.int64)
    tensors = [torch.full((3, 1), i, dtype=dtype) for i, dtype in enumerate(dtypes)]
    assert moved_together(tensors, [CPU] * 4) == tensors
    mixed = [each.to("meta") if i % 2 else each for i, each in enumerate(tensors)]
    with Copies() as copies:
        moved = moved_together(mixed, [META] * 4)
    assert copies.count == 1 and moved[1] is mixed[1]
    assert [(each.shape, each.dtype) for each in moved] == [((3, 1), dtype) for dtype in dtypes]


def test_norms_of_several_devices_are_gathered_by_one_copy_each():
    def scalars(*places: str) -> list[tuple[int, torch.Tensor]]:
        one = torch.ones((), dtype=torch.float64)
        return [(unit, one.to(place)) for unit, place in enumerate(places)]

    places = ("meta", "cpu", "cpu", "meta", "cpu")
    norms, kept = scalars(*places), scalars(*places)
    steps = agree(norms, kept, [1], own_state=True, steps=0, units=5, processes=1, me=0)
    with Copies() as copies:
        part, _ = next(steps)
    assert part.part.shape == (5, 2) and part.part.device == META
    # of the scalars themselves; positions travel with them
    assert copies.count <= 2 + 4
