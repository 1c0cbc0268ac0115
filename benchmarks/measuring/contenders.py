"""The optimizers that are measured, and matrices with gradients to measure them on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from benchmarks.compare.methods import FAMILIES, PUBLISHED, WITH_RANK, Method
from benchmarks.compare.optimizers import prepare
from benchmarks.compare.peers import PACKAGES
from benchmarks.measuring.shapes import Place, Shape

NEVER = 10**9
"""Steps to the next basis, where none is to be measured."""

ADAMW: dict[str, dict[str, Any]] = {"adamw": {"foreach": True}, "adamw-fused": {"fused": True}}
OURS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "medium": {"matmul_precision": "medium"},
    "no-residual": {"residual": "none"},
}
"""Our own, by what differs from the preset."""
PEERS = tuple(name for name in PACKAGES if name in PUBLISHED and name != "lora")
"""Packages of others."""
NAMES = (*OURS, *ADAMW, *PEERS)
LOW_RANK = (*OURS, *PEERS)
IN_TRAINING = (*OURS, "adamw", *PEERS)

LEARNING_RATE = 1e-6
"""Small, as the same gradients come again and again."""


class Matrices(nn.Module):
    """Linear layers, so many of each shape as it counts, with a gradient each."""

    def __init__(self, shapes: Iterable[Shape], place: Place) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(shape.columns, shape.rows, False, place.device, place.dtype)
            for shape in shapes
            for _ in range(shape.count)
        )
        for parameter in self.parameters():
            parameter.grad = torch.randn_like(parameter) / parameter.shape[1]


def optimizers_of(name: str, model: nn.Module, *, rank: int, gap: int = NEVER) -> list[Optimizer]:
    """The optimizer `name`, for a model that one process trains.

    Args:
        name: one of :data:`NAMES`.
        model: what it trains.
        rank: of every low-rank method, in all steps.
        gap: steps from one basis to the next, of the methods that have one.

    Raises:
        ImportError: the package of a peer is not installed.
        RuntimeError: torch's fused AdamW cannot work where the model lies.
    """
    if name in ADAMW:
        return [AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, **ADAMW[name])]
    return prepare(_method(name, rank, gap), model, lr=LEARNING_RATE, weight_decay=0.0).optimizers


def step_of(name: str, model: nn.Module, *, rank: int, gap: int = NEVER) -> Callable[[], None]:
    """A step of :func:`optimizers_of`, whose arguments these are."""
    optimizers = optimizers_of(name, model, rank=rank, gap=gap)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step


def own_settings(name: str, rank: int, gap: int) -> dict[str, Any]:
    """Settings of our optimizer `name`, with one rank in all steps."""
    always = {"max_rank": rank, "min_rank": rank, "min_gap": gap, "max_gap": gap}
    return {**always, **OURS[name]}


def steps_that_work(
    makers: Mapping[str, Callable[[], Callable[[], None]]], *, of: str | None = None
) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """Makes steps and takes each once.

    Args:
        makers: what makes a step, by the optimizer's name.
        of: the optimizer of all of them, where they have other names.

    Returns:
        The steps of those that can work, and why the others cannot, by name. What our own
        optimizer raises goes on to the caller.
    """
    working, refused = {}, {}
    for name, make in makers.items():
        try:
            step = make()
            step()
        except Exception as error:  # a package of others: whatever it raises is its answer
            if (of or name) in OURS:
                raise
            refused[name] = in_one_line(error)
        else:
            working[name] = step
    return working, refused


def in_one_line(error: BaseException) -> str:
    """The error's kind and its first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].strip()}"


def _method(name: str, rank: int, gap: int) -> Method:
    if name in OURS:
        return Method(name, FAMILIES["recommended"], own_settings(name, rank, gap))
    settings = {**PUBLISHED[name], "update_proj_gap": gap}
    if name in WITH_RANK:
        settings["rank"] = rank
    return Method(name, FAMILIES[name], settings)
