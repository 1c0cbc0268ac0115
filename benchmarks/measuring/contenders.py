"""The optimizers to measure, and matrices with gradients to measure them on."""

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
"""Refresh interval in steps when refreshes are not measured."""

ADAMW: dict[str, dict[str, Any]] = {"adamw": {"foreach": True}, "adamw-fused": {"fused": True}}
OURS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "medium": {"matmul_precision": "medium"},
    "matched": {"residual": "matched"},
    "no-residual": {"residual": "none"},
}
"""Variants of AdaRankGrad, by their difference from the preset."""
PEERS = tuple(name for name in PACKAGES if name in WITH_RANK and name != "lora")
"""Low-rank optimizers from third-party packages."""
NAMES = (*OURS, *ADAMW, *PEERS)
LOW_RANK = (*OURS, *PEERS)
IN_TRAINING = (*OURS, "adamw", *PEERS)

LEARNING_RATE = 1e-6
"""Small, since the same gradients are applied repeatedly."""


class Matrices(nn.Module):
    """Linear layers with random gradients, as many of each shape as its ``count``."""

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
    """Create the optimizer `name` for a model trained by one process.

    Args:
        name: one of :data:`NAMES`.
        model: the model to train.
        rank: constant rank of every low-rank method.
        gap: refresh interval in steps, for the methods that refresh.

    Raises:
        ImportError: the package of a peer is not installed.
        RuntimeError: torch's fused AdamW does not support the model's device.
    """
    if name in ADAMW:
        return [AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, **ADAMW[name])]
    return prepare(_method(name, rank, gap), model, lr=LEARNING_RATE, weight_decay=0.0).optimizers


def step_of(name: str, model: nn.Module, *, rank: int, gap: int = NEVER) -> Callable[[], None]:
    """A step of the optimizers from :func:`optimizers_of`, with the same arguments."""
    optimizers = optimizers_of(name, model, rank=rank, gap=gap)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step


def own_settings(name: str, rank: int, gap: int) -> dict[str, Any]:
    """Settings of the AdaRankGrad variant `name` with a constant rank."""
    always = {"max_rank": rank, "min_rank": rank, "min_gap": gap, "max_gap": gap}
    return {**always, **OURS[name]}


def steps_that_work(
    makers: Mapping[str, Callable[[], Callable[[], None]]], *, of: str | None = None
) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """Create steps and run each once.

    Args:
        makers: factories of steps by optimizer name.
        of: the optimizer of all steps, if the keys are not optimizer names.

    Returns:
        The working steps, and the reasons why the others fail, by name. Exceptions of AdaRankGrad
        propagate to the caller.
    """
    working, refused = {}, {}
    for name, make in makers.items():
        try:
            step = make()
            step()
        except Exception as error:  # third-party packages may raise anything
            if (of or name) in OURS:
                raise
            refused[name] = in_one_line(error)
        else:
            working[name] = step
    return working, refused


def in_one_line(error: BaseException) -> str:
    """The type of the error and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].strip()}"


def _method(name: str, rank: int, gap: int) -> Method:
    if name in OURS:
        return Method(name, FAMILIES["recommended"], own_settings(name, rank, gap))
    settings = {**PUBLISHED[name], "update_proj_gap": gap}
    if name in WITH_RANK:
        settings["rank"] = rank
    return Method(name, FAMILIES[name], settings)
