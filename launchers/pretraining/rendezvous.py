"""How the processes of a job meet where a launcher has restarted them.

torchrun keeps one store for all attempts (pytorch/pytorch#135712; torch 2.13 under `--standalone`
and without `--rdzv-backend`, too). In it a restarted process finds the addresses that the processes
before it left, and connects to the dead. So here each attempt agrees on a name first, under which
its own notes lie.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

SCHEME = "argdist"
POLL_SECONDS = 0.02


def init_method() -> str | None:
    """What ``dist.init_process_group`` is given; None, its default, where nothing restarts us."""
    if not dist.is_torchelastic_launched():
        return None
    with contextlib.suppress(RuntimeError):  # which says that it is registered already
        register_rendezvous_handler(SCHEME, _meet)
    return f"{SCHEME}://"


def _meet(
    url: str, timeout: timedelta = timedelta(minutes=30), **_: Any
) -> Iterator[tuple[Store, int, int]]:
    """As `env://`, with a part of the store that no earlier attempt has written to."""
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    name = agree_on_a_name(store, rank, world_size, timeout.total_seconds())
    yield PrefixStore(name, store), rank, world_size


def agree_on_a_name(store: Store, process: int, processes: int, seconds: float) -> str:
    """A name that all processes of this attempt, and none of another one, have.

    The first process makes it up. Each of the others asks with a number of its own and takes
    nothing but an answer to that, so that notes of an earlier attempt mislead nobody.

    Args:
        store: what the processes met by; earlier attempts may have left notes in it.
        process: index of this process.
        processes: how many there are.
        seconds: how long to wait for the others.

    Raises:
        RuntimeError: not all came in time.
    """
    if process > 0:
        question = uuid.uuid4().hex
        store.set(f"{SCHEME}/question/{process}", question)
        store.wait([f"{SCHEME}/answer/{question}"], timedelta(seconds=seconds))
        name = store.get(f"{SCHEME}/answer/{question}").decode()
        store.add(f"{name}/there", 1)
        return name
    name, answered = f"{SCHEME}/{uuid.uuid4().hex}", set()
    deadline = time.monotonic() + seconds
    while (there := store.add(f"{name}/there", 0)) < processes - 1:
        for other in range(1, processes):
            key = f"{SCHEME}/question/{other}"
            if store.check([key]) and (question := store.get(key).decode()) not in answered:
                store.set(f"{SCHEME}/answer/{question}", name)
                answered.add(question)
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{there + 1} of {processes} processes have come within {seconds:g} s; look at the "
                "output of the others, or at the launcher's number of processes"
            )
        time.sleep(POLL_SECONDS)
    return name
