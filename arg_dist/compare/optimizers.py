"""The optimizer of a method, for a model: the same matrices are low-rank for all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import arg_dist
from arg_dist.compare.methods import OURS, Method
from arg_dist.compare.peers import published

Groups = list[dict[str, Any]]


def low_rank_matrices(model: nn.Module) -> list[Tensor]:
    """The matrices that low-rank methods are for, as :func:`arg_dist.param_groups` tells them."""
    groups = arg_dist.param_groups(model)
    return [p for group in groups if group.get("low_rank", True) for p in group["params"]]


def build(method: Method, model: nn.Module, *, lr: float, weight_decay: float) -> list[Optimizer]:
    """The optimizers (Muon needs two) that together train all parameters of `model`.

    Raises:
        ConfigError: our own optimizer refuses a setting.
    """
    shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if method.family == OURS:
        groups = arg_dist.param_groups(model)
        return [arg_dist.AdaRankGrad(groups, process_group=None, **shared, **method.settings)]
    trained = [p for p in model.parameters() if p.requires_grad]
    if method.family in ("adamw", "lora"):
        return [torch.optim.AdamW(trained, **shared)]
    matrices = low_rank_matrices(model)
    own = {id(p) for p in matrices}
    rest = [p for p in trained if id(p) not in own]
    if method.family == "muon":
        return [
            torch.optim.Muon(matrices, **shared, **method.settings),
            torch.optim.AdamW(rest, **shared),
        ]
    groups = [{"params": rest}, *_by_rank(matrices, method.settings)]
    if method.family == "galore":
        return [published("galore_torch", "adamw", "AdamW")(groups, **shared, **_QUIET)]
    if method.family == "apollo":
        return [published("apollo_torch", "apollo", "AdamW")(groups, **shared)]
    if method.family == "fira":
        return [published("fira", "fira_adamw", "AdamW")(groups, **shared, **_QUIET)]
    raise AssertionError(method.family)


_QUIET = {"no_deprecation_warning": True}


def rank_for(shape: tuple[int, ...], rank: int | float) -> int:
    """A rank, given as a number or as a fraction of the shorter side of `shape`, as a number."""
    short = min(shape)
    return min(rank, short) if isinstance(rank, int) else max(1, round(rank * short))


def _by_rank(matrices: list[Tensor], settings: dict[str, Any]) -> Groups:
    """A group for each rank: a fraction is another number for matrices of another size."""
    groups: dict[int, Groups] = {}
    for matrix in matrices:
        rank = rank_for(tuple(matrix.shape), settings["rank"])
        empty = {**settings, "rank": rank, "params": []}
        groups.setdefault(rank, [empty])[0]["params"].append(matrix)
    return [group for each in groups.values() for group in each]
