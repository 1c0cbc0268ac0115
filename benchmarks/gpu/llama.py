"""A Llama's weights and gradients, without a forward pass, and the optimizers that step on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import arg_dist
from arg_dist.planning.llama import LLAMA_SIZES, skeleton
from benchmarks.measuring.contenders import LEARNING_RATE, NEVER
from benchmarks.measuring.shapes import Place

ADAMW = "fused AdamW"
RULES: dict[str, dict[str, Any]] = {
    "residual none": {"residual": "none"},
    "matched": {"residual": "matched"},
    "orthogonalized": {"residual": "orthogonalized"},
    "orthogonalized in bf16": {"residual": "orthogonalized", "polar_precision": "bf16"},
}
"""Variants of AdaRankGrad; orthogonalized is the default."""
GRADIENT = 1e-3
"""Size of an element of a gradient."""


def llama(name: str, layers: int | None, vocabulary: int, place: Place) -> nn.Module:
    """All parameters of a size in ``LLAMA_SIZES``, with random gradients.

    Args:
        name: the size.
        layers: number of layers; None for that of the size.
        vocabulary: number of tokens.
        place: device, and type of weights and gradients.
    """
    size = LLAMA_SIZES[name]
    size = size if layers is None else replace(size, layers=layers)
    model = skeleton(size, vocabulary).to(place.dtype).to_empty(device=place.device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
        parameter.grad = torch.randn_like(parameter).mul_(GRADIENT)
    return model


def optimizers(model: nn.Module, rank: int, *, refreshing: bool) -> dict[str, Optimizer]:
    """Every optimizer, by name, of the same weights.

    Args:
        model: the model.
        rank: constant rank of the low-rank matrices.
        refreshing: whether every step has a refresh, or none but the first; AdamW has none.
    """
    gap = 1 if refreshing else NEVER
    constant = {"max_rank": rank, "min_rank": rank, "min_gap": gap, "max_gap": gap}
    found: dict[str, Optimizer] = {}
    if not refreshing:
        found[ADAMW] = AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    for name, rule in RULES.items():
        groups = arg_dist.param_groups(model)
        given = {"lr": LEARNING_RATE, "process_group": None, **constant, **rule}
        found[name] = arg_dist.AdaRankGrad(groups, **given)
    return found
