"""What `with_adarankgrad` makes of a specification, with one of torchtitan's shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import arg_dist
from arg_dist.integrations.torchtitan import with_adarankgrad


@dataclasses.dataclass
class Spec:
    """The part of a TrainSpec that is needed."""

    build_optimizers_fn: Callable[..., Any]
    flavor: str = "debugmodel"


class Container(torch.optim.Optimizer):
    """As torchtitan's: several optimizers, and hooks of its own."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.optimizers = [torch.optim.AdamW(part.parameters()) for part in parts]
        super().__init__([p for part in parts for p in part.parameters()], {})

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def build(**changed: Any) -> Container:
    """What torchtitan's Trainer gets of the specification."""
    given = {"early_step_in_backward": False, "pp_enabled": False, "enabled": False, **changed}
    config = SimpleNamespace(lr=3e-3, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1, **given)
    spec = with_adarankgrad(Spec(lambda parts, *others: Container(parts)), max_rank=4)
    assert spec.flavor == "debugmodel"
    part = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    dims = SimpleNamespace(pp_enabled=given["pp_enabled"], pp=2)
    built: Container = spec.build_optimizers_fn(
        [part], config, dims, SimpleNamespace(enabled=given["enabled"])
    )
    return built


def test_the_container_holds_adarankgrad_with_the_jobs_settings() -> None:
    (optimizer,) = build().optimizers
    assert isinstance(optimizer, arg_dist.AdaRankGrad)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.8, 0.9), 1e-6)
        assert (group["weight_decay"], group["max_rank"]) == (0.1, 4)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight"]


def test_the_containers_own_hooks_stay() -> None:
    container, seen = build(), []
    container.register_step_pre_hook(lambda *given: seen.append("before"))
    for group in container.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    container.step()
    assert seen == ["before"]
    assert container.optimizers[0].calls == 1


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"early_step_in_backward": True}, r"early_step_in_backward: got true; .* set it to false"),
        ({"pp_enabled": True}, r"pipeline_parallel_degree: got 2; .* set it to 1"),
        ({"enabled": True}, r"fault_tolerance.enable: got true; .* set it to false"),
    ],
)
def test_jobs_that_cannot_be_meant_are_refused(changed: dict[str, bool], told: str) -> None:
    with pytest.raises(arg_dist.ConfigError, match=told):
        build(**changed)


def test_a_misspelled_setting_is_told_at_once() -> None:
    with pytest.raises(arg_dist.ConfigError, match="maxrank"):
        with_adarankgrad(Spec(Container), maxrank=4)  # type: ignore[call-arg]
