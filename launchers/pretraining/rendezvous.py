"""A rendezvous that works after a launcher has restarted the processes of a job.

torchrun keeps one store for all attempts (pytorch/pytorch#135712; torch 2.13 under `--standalone`
and without `--rdzv-backend`, too). In it a restarted process finds the addresses of the previous
attempt and connects to processes that no longer exist. So each attempt first agrees on a name that
prefixes its keys.
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
    """The argument of ``dist.init_process_group``; None, its default, outside torch elastic."""
    if not dist.is_torchelastic_launched():
        return None
    with contextlib.suppress(RuntimeError):  # already registered
        register_rendezvous_handler(SCHEME, _meet)
    return f"{SCHEME}://"


def _meet(
    url: str, timeout: timedelta = timedelta(minutes=30), **_: Any
) -> Iterator[tuple[Store, int, int]]:
    """Like `env://`, with a store prefix that no earlier attempt has written to."""
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    name = agree_on_a_name(store, rank, world_size, timeout.total_seconds())
    yield PrefixStore(name, store), rank, world_size


def agree_on_a_name(store: Store, process: int, processes: int, seconds: float) -> str:
    """A name that is common to all processes of this attempt, and unique to it.

    The first process generates it. Each other process posts a random identifier and accepts only
    the answer to that, so keys of an earlier attempt cannot mislead it.

    Args:
        store: the rendezvous store, possibly with keys of earlier attempts.
        process: index of this process.
        processes: number of processes.
        seconds: how long to wait for the others.

    Raises:
        RuntimeError: not all processes arrived in time.
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
                f"{there + 1} of {processes} processes arrived within {seconds:g} s; check the "
                "output of the others, and the launcher's number of processes"
            )
        time.sleep(POLL_SECONDS)
    return name
