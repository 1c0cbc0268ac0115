"""The optimizers that are timed, each with matrices of one shape and a gradient for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from arg_dist.bench.shapes import Place, Shape
from arg_dist.compare.methods import FAMILIES, PUBLISHED, WITH_RANK, Method
from arg_dist.compare.optimizers import prepare

NEVER = 10**9
"""Steps to the next basis, where none is to be timed."""

ADAMW: dict[str, dict[str, Any]] = {"adamw": {"foreach": True}, "adamw-fused": {"fused": True}}
OURS: dict[str, dict[str, Any]] = {"recommended": {}, "no-residual": {"residual": "none"}}
"""Our own, by what differs from the preset."""
PEERS = ("galore", "apollo", "fira")
NAMES = (*OURS, *ADAMW, *PEERS)

LEARNING_RATE = 1e-6
"""Small, as the same gradients come again and again."""


class Matrices(nn.Module):
    """So many linear layers of one shape, with a gradient each."""

    def __init__(self, shape: Shape, count: int, place: Place) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(shape.columns, shape.rows, False, place.device, place.dtype)
            for _ in range(count)
        )
        for parameter in self.parameters():
            parameter.grad = torch.randn_like(parameter) / shape.columns


def step_of(name: str, matrices: Matrices, *, rank: int, gap: int = NEVER) -> Callable[[], None]:
    """A step of the optimizer `name` on `matrices`.

    Args:
        name: one of :data:`NAMES`.
        matrices: what it trains.
        rank: of every low-rank method, in all steps.
        gap: steps from one basis to the next, of the methods that have one.

    Raises:
        ImportError: the package of a peer is not installed.
    """
    if name in ADAMW:
        optimizers: Iterable[Any] = [
            AdamW(matrices.parameters(), lr=LEARNING_RATE, weight_decay=0.0, **ADAMW[name])
        ]
    else:
        training = prepare(_method(name, rank, gap), matrices, lr=LEARNING_RATE, weight_decay=0.0)
        optimizers = training.optimizers

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step


def _method(name: str, rank: int, gap: int) -> Method:
    if name in OURS:
        always = {"max_rank": rank, "min_rank": rank, "min_gap": gap, "max_gap": gap}
        return Method(name, FAMILIES["recommended"], {**always, **OURS[name]})
    settings = {**PUBLISHED[name], "update_proj_gap": gap}
    if name in WITH_RANK:
        settings["rank"] = rank
    return Method(name, FAMILIES[name], settings)
