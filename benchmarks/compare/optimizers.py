"""Build the optimizers of a method; the same matrices are low-rank for all methods."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import arg_dist
from arg_dist.config import rank_of
from arg_dist.groups import HEADS
from benchmarks.compare.methods import OURS, Method
from benchmarks.compare.peers import published

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Training:
    """A model with the optimizers that train it.

    Attributes:
        model: the model.
        optimizers: the optimizers that together train it; Muon needs two.
        counted: the parameters whose state counts as that of the low-rank matrices: the matrices
            themselves, or their LoRA adapters.
        matrix_elements: number of elements in the low-rank matrices.
        elements: number of elements in all parameters that full training updates.
    """

    model: nn.Module
    optimizers: list[Optimizer]
    counted: list[Tensor]
    matrix_elements: int
    elements: int


def prepare(method: Method, model: nn.Module, *, lr: float, weight_decay: float) -> Training:
    """Create the optimizers, and for LoRA the adapters.

    Args:
        method: the method.
        model: a fresh model; LoRA modifies it.
        lr: learning rate of all parameters.
        weight_decay: decoupled weight decay; not applied to norms and biases.

    Raises:
        ConfigError: an AdaRankGrad setting is invalid.
    """
    matrices = low_rank_matrices(model)
    matrix_elements = sum(matrix.numel() for matrix in matrices.values())
    elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counted = list(matrices.values())
    if method.family == "lora":
        model = _with_adapters(model, matrices, method.settings)
        counted = [p for name, p in model.named_parameters() if "lora_" in name]
    shared = {"lr": lr, "weight_decay": weight_decay}
    optimizers = _build(method, model, list(matrices.values()), shared)
    return Training(model, optimizers, counted, matrix_elements, elements)


def low_rank_matrices(model: nn.Module) -> dict[str, Tensor]:
    """The matrices that low-rank methods train, as selected by :func:`arg_dist.param_groups`."""
    return {
        name: parameter
        for group in arg_dist.param_groups(model)
        if group.get("low_rank", True)
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _build(
    method: Method, model: nn.Module, matrices: list[Tensor], shared: dict[str, Any]
) -> list[Optimizer]:
    if method.family == OURS:
        groups = arg_dist.param_groups(model, decay_vectors=False)
        return [arg_dist.AdaRankGrad(groups, process_group=None, **shared, **method.settings)]
    trained = [p for p in model.parameters() if p.requires_grad]
    if method.family in ("adamw", "lora"):
        return [torch.optim.AdamW(_by_decay(trained), **shared)]
    own = {id(p) for p in matrices}
    rest = _by_decay(p for p in trained if id(p) not in own)
    if method.family == "muon":
        return [
            torch.optim.Muon(matrices, **shared, **method.settings),
            torch.optim.AdamW(rest, **shared),
        ]
    groups = [*rest, *_by_rank(matrices, method.settings)]
    quiet = {"no_deprecation_warning": True}
    if method.family == "galore":
        return [published("galore_torch", "adamw", "AdamW")(groups, **shared, **quiet)]
    if method.family == "apollo":
        return [published("apollo_torch", "apollo", "AdamW")(groups, **shared)]
    if method.family == "fira":
        return [published("fira", "fira_adamw", "AdamW")(groups, **shared, **quiet)]
    raise AssertionError(method.family)


def _by_decay(parameters: Iterable[Tensor]) -> Groups:
    """Two groups: matrices, and norms and biases, which are not decayed."""
    given = list(parameters)
    groups: Groups = [
        {"params": [p for p in given if p.ndim >= 2]},
        {"params": [p for p in given if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _by_rank(matrices: list[Tensor], settings: dict[str, Any]) -> Groups:
    """One group per rank: a fractional rank depends on the size of the matrix."""
    groups: dict[int, dict[str, Any]] = {}
    for matrix in matrices:
        rank = rank_of(settings["rank"], min(matrix.shape))
        groups.setdefault(rank, {**settings, "rank": rank, "params": []})["params"].append(matrix)
    return list(groups.values())


def _with_adapters(
    model: nn.Module, matrices: dict[str, Tensor], settings: dict[str, Any]
) -> nn.Module:
    """Add LoRA adapters to the low-rank matrices of `model`; its head is trained in full.

    ``alpha`` is a multiple of the rank, so its effect is independent of the rank.
    """
    from peft import LoraConfig, get_peft_model

    ranks = {
        name.removesuffix(".weight"): rank_of(settings["rank"], min(matrix.shape))
        for name, matrix in matrices.items()
    }
    heads = {name.split(".")[-1] for name in _heads(model)}
    config = LoraConfig(
        target_modules=list(ranks),
        rank_pattern=ranks,
        alpha_pattern={name: settings["alpha"] * rank for name, rank in ranks.items()},
        lora_dropout=settings["dropout"],
        modules_to_save=sorted(heads),
    )
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def _heads(model: nn.Module) -> list[str]:
    """Names of the outermost modules that are output heads."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name.split(".")[-1] in HEADS and not inside and any(True for _ in module.parameters()):
            found.append(name)
    return found
