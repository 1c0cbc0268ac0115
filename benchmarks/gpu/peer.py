"""One of the processes that send each other messages.

Started as ``python -m benchmarks.gpu.peer FOLDER DEVICE PROCESSES K``. They meet at a file in
FOLDER, and each writes what works, and the first thing that does not, to FOLDER/process-K.json.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import arg_dist
from arg_dist.sharding.communicator import Communicator
from arg_dist.subspace.distributed import Exchange, even_rows
from benchmarks.measuring.timing import seconds_of
from launchers.reporting.files import write_json

LIMIT, SHORT = 30.0, 7.0
"""Seconds after which a collective fails: the job's, and those of a group of its own."""
BYTES = 2**16
ROWS = 64


@dataclass(frozen=True)
class Peers:
    """The processes, of which this is one.

    Attributes:
        group: all of them.
        communicator: the optimizer's collectives in it.
        device: device of the messages.
        size: number of processes.
        me: index of this one.
    """

    group: dist.ProcessGroup
    communicator: Communicator
    device: torch.device
    size: int
    me: int


def gather_objects(peers: Peers) -> None:
    """A Python object of each, as at binding."""
    found = peers.communicator.gather_objects({"me": peers.me})
    assert found == [{"me": k} for k in range(peers.size)]


def send_nothing(peers: Peers) -> None:
    """An all-to-all in which no process has anything for any other."""
    nothing = torch.empty(0, dtype=torch.uint8, device=peers.device)
    _all_to_all(peers, nothing, torch.empty_like(nothing), [0] * peers.size, [0] * peers.size)


def send_bytes(peers: Peers) -> None:
    """Bytes, as many as the number of the receiver says: k times those of the first."""
    sizes = [BYTES * (k + 1) for k in range(peers.size)]
    sent = torch.full((sum(sizes),), peers.me, dtype=torch.uint8, device=peers.device)
    arriving = [sizes[peers.me]] * peers.size
    received = torch.empty(sum(arriving), dtype=torch.uint8, device=peers.device)
    _all_to_all(peers, sent, received, sizes, arriving)
    parts = received.split(arriving)
    assert [int(part.unique().item()) for part in parts] == list(range(peers.size))


def two_in_flight(peers: Peers) -> None:
    """Two rounds of the optimizer, of which the second begins before the first has ended."""
    waiting = [peers.communicator.begin([_request(peers, scale)]) for scale in (1.0, 2.0)]
    for scale, finish in zip((1.0, 2.0), waiting, strict=True):
        (total,) = finish()
        assert bool((total == scale * peers.size).all())


def own_limit(peers: Peers) -> None:
    """A group with a time limit of its own, in which a round has a shorter one."""
    group = dist.new_group(timeout=timedelta(seconds=SHORT))
    communicator = Communicator(group, SHORT / 2, known=peers.device)
    (total,) = communicator.exchange([_request(peers, 1.0)])
    assert bool((total == peers.size).all())


def step(peers: Peers) -> None:
    """Steps of the optimizer on weights that all processes have."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(48, 32, device=peers.device)) for _ in range(3)]
    groups = [{"params": [(f"{k}.weight", w) for k, w in enumerate(weights)], "low_rank": True}]
    optimizer = arg_dist.AdaRankGrad(groups, max_rank=8)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones_like(weight) + weight.detach()
        optimizer.step()
    assert all(bool(weight.isfinite().all()) for weight in weights)


CHECKS: dict[str, Callable[[Peers], None]] = {
    "gather of an object": gather_objects,
    "messages without content": send_nothing,
    "bytes": send_bytes,
    "two rounds in flight": two_in_flight,
    "a time limit of its own": own_limit,
    "two steps of the optimizer": step,
}


def _request(peers: Peers, value: float) -> Exchange:
    """Everyone has a term of all rows, and wants the sum of its own."""
    part = torch.full((ROWS, 4), value, dtype=torch.float32, device=peers.device)
    return Exchange(part, ((0, ROWS),) * peers.size, even_rows(ROWS, peers.size))


def _all_to_all(
    peers: Peers, sent: torch.Tensor, received: torch.Tensor, to: list[int], of: list[int]
) -> None:
    options = dist.AllToAllOptions()
    options.timeout, options.asyncOp = timedelta(seconds=SHORT), True
    peers.group.alltoall_base(received, sent, of, to, options).wait()


def checked(peers: Peers, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Seconds of each check, until the first that fails; `keep` is called with them after each."""
    report: dict[str, Any] = {"seconds": {}, "error": None}
    for name, check in CHECKS.items():
        try:
            check(peers)
            report["seconds"][name] = seconds_of(lambda check=check: check(peers))  # type: ignore[misc]
        except Exception as error:
            told = " ".join(str(error).split())
            report["error"] = f"{name}: {type(error).__name__}: {told}"
        keep(report)
        if report["error"]:
            break
    return report


def main(folder: str, device_name: str, processes: str, index: str) -> int:
    """Join the others, and check what messages work."""
    device, size, me = torch.device(device_name), int(processes), int(index)
    path = Path(folder, f"process-{me}.json")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        device = torch.device("cuda", torch.cuda.current_device())
    began = time.perf_counter()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=me,
        world_size=size,
        timeout=timedelta(seconds=LIMIT),
    )
    group = dist.group.WORLD
    assert group is not None
    peers = Peers(group, Communicator(group, known=device), device, size, me)
    joined = time.perf_counter() - began
    report = checked(peers, lambda found: write_json(path, found | {"joined": joined}))
    if report["error"]:
        sys.stdout.flush()
        os._exit(1)  # the others may be gone, and leaving the group would wait for them
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
