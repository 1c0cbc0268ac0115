"""Steps of the algorithm and of the optimizer where one process holds everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from arg_dist import AdaRankGrad, AdaRankGradConfig
from arg_dist.algorithm import LowRankUpdate, State, StepFacts, low_rank_step
from arg_dist.sharding.drivers import run_local
from arg_dist.subspace.distributed import single_process
from arg_dist.subspace.norms import row_squares


def one_step(
    gradient: Tensor, state: State, *, phase: float = 0.0, **settings: Any
) -> LowRankUpdate | None:
    """One step on ``gradient``, ``moment x basis``, as the optimizer would call it."""
    facts = StepFacts(
        name="w",
        norm_sq=float(gradient.double().square().sum()),
        kept_sq=float(state.get("kept_sq", 0.0)),
        phase=phase,
    )
    return run_local(
        low_rank_step(
            lambda: gradient,
            row_squares(gradient),
            state,
            single_process(*gradient.shape),
            AdaRankGradConfig(**{"min_rank": 1, **settings}),
            facts,
        )
    )


def optimizer_of(*weights: Tensor, **settings: Any) -> AdaRankGrad:
    """An optimizer of copies of these weights, called ``w0``, ``w1``, ..."""
    named = [(f"w{i}", nn.Parameter(weight.clone())) for i, weight in enumerate(weights)]
    return AdaRankGrad(named, **{"max_rank": 4, "min_rank": 1, **settings})


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def feed(optimizer: torch.optim.Optimizer, *gradients: Tensor | None) -> None:
    """One step with these gradients, one for each parameter."""
    for parameter, gradient in zip(parameters_of(optimizer), gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.to(parameter.dtype, copy=True)
    optimizer.step()


def train(optimizer: torch.optim.Optimizer, steps: list[list[Tensor | None]]) -> list[Tensor]:
    """Copies of the weights after these steps."""
    for gradients in steps:
        feed(optimizer, *gradients)
    return [parameter.detach().clone() for parameter in parameters_of(optimizer)]
