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
from arg_dist.model_groups import HEADS
from benchmarks.compare.methods import OURS, TWO_OPTIMIZERS, Method
from benchmarks.compare.peers import published

Groups = list[dict[str, Any]]

BETAS = (0.9, 0.999)
"""torch's default decay rates of AdamW, where a method sets none."""


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


@dataclass(frozen=True)
class _Parts:
    """Settings of one method's parts.

    Attributes:
        matrices: settings of the low-rank matrices, without the learning rate.
        rest: learning rate and betas of all other parameters.
        shared: learning rate of the low-rank matrices, and the weight decay.
    """

    matrices: dict[str, Any]
    rest: dict[str, Any]
    shared: dict[str, Any]


def prepare(
    method: Method,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    rest_lr: float | None = None,
) -> Training:
    """Create the optimizers, and for LoRA the adapters.

    Args:
        method: the method.
        model: a fresh model; LoRA modifies it.
        lr: learning rate of the low-rank matrices; for LoRA, of all that it trains.
        weight_decay: decoupled weight decay; not applied to norms and biases.
        rest_lr: learning rate of embeddings, output head, norms and biases; None for `lr`.

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
    settings = dict(method.settings)
    rest = {"lr": lr if rest_lr is None else rest_lr, "betas": settings.pop("rest_betas", BETAS)}
    parts = _Parts(settings, rest, {"lr": lr, "weight_decay": weight_decay})
    optimizers = _build(method.family, model, list(matrices.values()), parts)
    return Training(model, optimizers, counted, matrix_elements, elements)


def low_rank_matrices(model: nn.Module) -> dict[str, Tensor]:
    """The matrices that low-rank methods train, as selected by :func:`arg_dist.param_groups`."""
    return {
        name: parameter
        for group in arg_dist.param_groups(model)
        if group.get("low_rank", True)
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _build(family: str, model: nn.Module, matrices: list[Tensor], parts: _Parts) -> list[Optimizer]:
    if family == OURS:
        return [_ours(model, parts)]
    trained = [p for p in model.parameters() if p.requires_grad]
    if family == "lora":
        return [torch.optim.AdamW(_by_decay(trained), **parts.shared)]
    own = {id(p) for p in matrices}
    rest = [group | parts.rest for group in _by_decay(p for p in trained if id(p) not in own)]
    if family == "adamw":
        groups = [{**parts.matrices, "params": matrices}, *rest]
        return [torch.optim.AdamW(groups, **parts.shared)]
    if family in TWO_OPTIMIZERS:
        apart = [torch.optim.AdamW(rest, **parts.shared)] if rest else []
        return [_for_matrices(family, matrices, parts), *apart]
    return [_projected(family, [*rest, *_by_rank(matrices, parts.matrices)], parts)]


def _ours(model: nn.Module, parts: _Parts) -> Optimizer:
    groups = arg_dist.param_groups(model, decay_vectors=False)
    for group in groups:
        if not group.get("low_rank", True):
            group["lr"] = parts.rest["lr"]
    return arg_dist.AdaRankGrad(groups, process_group=None, **parts.shared, **parts.matrices)


def _for_matrices(family: str, matrices: list[Tensor], parts: _Parts) -> Optimizer:
    """An optimizer that trains matrices alone."""
    if family == "muon":
        return torch.optim.Muon(matrices, **parts.shared, **parts.matrices)
    optimizer: Optimizer
    if family == "soap":
        soap = published("pytorch_optimizer", "optimizer.soap", "SOAP")
        optimizer = soap(matrices, **parts.shared, **parts.matrices)
    else:
        normuon = published("pytorch_optimizer", "optimizer.muon.normuon", "NorMuon")
        groups = [{"params": matrices, "use_muon": True}]
        optimizer = normuon(groups, **parts.shared, **parts.matrices)
    return optimizer


def _projected(family: str, groups: Groups, parts: _Parts) -> Optimizer:
    """The published AdamW that projects the gradients of the groups with a rank."""
    quiet = {"no_deprecation_warning": True}
    optimizer: Optimizer
    if family == "galore":
        galore = published("galore_torch", "adamw", "AdamW")
        optimizer = galore(groups, **parts.shared, **quiet)
    elif family == "apollo":
        optimizer = published("apollo_torch", "apollo", "AdamW")(groups, **parts.shared)
    elif family == "fira":
        optimizer = published("fira", "fira_adamw", "AdamW")(groups, **parts.shared, **quiet)
    else:
        raise AssertionError(family)
    return optimizer


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
