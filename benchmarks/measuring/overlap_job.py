"""A process of the overlap job: optimizer steps with alternating lanes, and with a single lane."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from arg_dist.sharding import overlap
from arg_dist.sharding.shard import local_part
from benchmarks.measuring.contenders import NEVER
from benchmarks.measuring.engines import build
from benchmarks.measuring.timing import in_turns

WAYS = {"one lane": 1, "in turns": overlap.AT_ONCE}
"""Lanes in flight at a time, by variant; the names are keys of the JSON samples."""
LENGTH = 64
"""Sequence length of the model, which is never run."""


def steps_in_turns(
    *, engine: str, model: str, rank: int, device: str, rounds: int
) -> dict[str, Any]:
    """Time a step without a refresh in each variant of :data:`WAYS`, and count what it sends.

    Args:
        engine: ``ddp`` or ``fsdp2``; the process group must be initialized.
        model: a size of ``LLAMA_SIZES``.
        rank: rank of all matrices.
        device: device to run on.
        rounds: timed steps of each variant.
    """
    steps: dict[str, Callable[[], None]] = {}
    optimizers: dict[str, Any] = {}
    place = torch.device(device)
    for way, at_once in WAYS.items():
        trained = build(engine, "matched", model, rank=rank, length=LENGTH, device=place, gap=NEVER)
        give_gradients(trained.model, same=engine == "ddp")
        (optimizers[way],) = trained.optimizers
        steps[way] = partial(_step, optimizers[way], at_once)
        steps[way]()  # allocates the state
    sent = {way: _sent_in(steps[way], optimizers[way]) for way in WAYS}
    times = in_turns(steps, rounds)
    return {"seconds": {way: taken.as_json() for way, taken in times.items()}, "sent": sent}


def give_gradients(model: nn.Module, *, same: bool) -> None:
    """Set random gradients on all parameters, equal on all processes if `same`."""
    seed = 0 if same else int(os.environ["RANK"])
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        part = local_part(parameter.grad)
        part.copy_(torch.randn(part.shape, generator=generator))


@contextmanager
def lanes_at_once(count: int) -> Iterator[None]:
    """Set the number of lanes in flight at a time."""
    before, overlap.AT_ONCE = overlap.AT_ONCE, count
    try:
        yield
    finally:
        overlap.AT_ONCE = before


def _step(optimizer: Any, at_once: int) -> None:
    with lanes_at_once(at_once):
        optimizer.step()


def _sent_in(step: Callable[[], None], optimizer: Any) -> dict[str, int]:
    """Run a step and return the bytes that this process sends and its number of collectives."""
    sent, collectives = optimizer.comm_bytes(), optimizer.collectives()
    step()
    return {
        "bytes": optimizer.comm_bytes() - sent,
        "collectives": optimizer.collectives() - collectives,
    }
