"""What earlier versions saved is loaded, and training continues as theirs did.

``tests/data/before-0.2`` was written by arg_dist 0.1.0 (commit 5caac83, checkpoint schema 2): nine
steps of :func:`training`, saved after five as a checkpoint and as a state dictionary; and the
weights after the ninth.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import arg_dist
import arg_dist.checkpoint
from tests.tolerances import ROUNDING

SAVED = Path(__file__).parents[1] / "data" / "before-0.2"
SAVED_AFTER, LAST = 5, 9


def training() -> tuple[nn.ModuleDict, arg_dist.AdaRankGrad]:
    torch.manual_seed(0)
    layers = {"first": nn.Linear(10, 14), "second": nn.Linear(14, 6, bias=False)}
    model = nn.ModuleDict(layers)
    optimizer = arg_dist.AdaRankGrad(
        arg_dist.param_groups(model),
        process_group=None,
        lr=1e-2,
        residual="scaled",
        residual_momentum=0.0,
        energy=0.65,
        max_rank=4,
        min_rank=2,
        min_gap=2,
        max_gap=3,
        state_budget="64KiB",
    )
    return model, optimizer


def step(model: nn.Module, optimizer: arg_dist.AdaRankGrad, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def by_checkpoint(model: nn.Module, optimizer: arg_dist.AdaRankGrad) -> None:
    restored = arg_dist.checkpoint.load(SAVED / "checkpoint", optimizer, model=model)
    assert restored.step == SAVED_AFTER


def by_state_dict(model: nn.Module, optimizer: arg_dist.AdaRankGrad) -> None:
    other = training()
    by_checkpoint(*other)
    model.load_state_dict(other[0].state_dict())
    optimizer.load_state_dict(torch.load(SAVED / "state_dict.pt", weights_only=True))


@pytest.mark.parametrize("load", [by_checkpoint, by_state_dict])
@pytest.mark.filterwarnings("error")
def test_training_continues_as_the_old_version_did(load):
    model, optimizer = training()
    load(model, optimizer)
    for number in range(SAVED_AFTER, LAST):
        step(model, optimizer, number)
    weights, expected = model.state_dict(), load_file(SAVED / "continued.safetensors")
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        ROUNDING.check(weights[name], value)


def test_training_continues_without_the_momentum_that_the_old_version_did_not_have():
    model, optimizer = training()
    for group in optimizer.param_groups:
        group["residual_momentum"] = 0.9
    told = r"checkpoint's settings: .*residual_momentum=0\.0 instead of 0\.9"
    with pytest.warns(UserWarning, match=told):
        by_checkpoint(model, optimizer)
    assert {group["residual_momentum"] for group in optimizer.param_groups} == {0.0}
    optimizer.param_groups[0]["residual_momentum"] = 0.9
    optimizer.load_state_dict(torch.load(SAVED / "state_dict.pt", weights_only=True))
    assert {group["residual_momentum"] for group in optimizer.param_groups} == {0.0}
