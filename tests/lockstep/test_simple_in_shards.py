"""A model whose matrices are cut over shards trains as the simple optimizer trains it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from cuts import cut_matrix, equal_pieces, ranges_of, weight_of, whole_rows, without_bystanders
from lockstep_steps import step_in_lockstep
from small_model import (
    DEFAULTS,
    REFRESHING,
    WHOLE_SKETCH,
    SmallModel,
    Training,
    check_alike,
    training,
)
from torch import Tensor, nn

from arg_dist import AdaRankGrad, AdaRankGradConfig, param_groups
from arg_dist.optimizer import RENEWED_TOGETHER
from arg_dist.parameter_groups import trained_views
from arg_dist.sharding.layout import Ranges, basis_spans_columns
from arg_dist.sharding.plan import phase_of
from arg_dist.sharding.shard import MatrixShard
from arg_dist.simple import AdaRankGradSimple

SETTINGS = {"weight_decay": 0.1, **WHOLE_SKETCH, **REFRESHING}

CUTS: dict[str, Callable[[int, int], Ranges]] = {
    "whole rows": lambda rows, columns: whole_rows(rows, columns, 3),
    "equal pieces": lambda rows, columns: equal_pieces(rows * columns, 5),
    "part of a row": lambda rows, columns: ranges_of([7, columns + 3], rows * columns),
    "all on one": lambda rows, columns: ((0, rows * columns),),
}


class InShards:
    """Trains the matrices of a model in shards, and the rest by the optimizer in one process.

    Args:
        model: the model.
        cut: the element ranges of a matrix, from its rows and columns as stored.
        transposed: matrices are stored transposed, as where columns are sharded.
        replicated: each process has everything, and only work and state are divided.
        **settings: those of the optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        cut: Callable[[int, int], Ranges],
        *,
        transposed: bool = False,
        replicated: bool = False,
        **settings: Any,
    ) -> None:
        self.settings, self.transposed = AdaRankGradConfig(**settings), transposed
        self.stagger = max(1, len(list(model.parameters())) // RENEWED_TOGETHER)
        self.state: dict[Tensor, dict[str, Any]] = {}
        self.matrices: list[tuple[Tensor, list[MatrixShard], list[dict]]] = []
        candidates, others = param_groups(model)
        rest = list(zip(others["param_names"], others["params"], strict=True))
        for name, parameter in zip(candidates["param_names"], candidates["params"], strict=True):
            if not trained_views(name, tuple(parameter.shape), self.settings):
                rest.append((name, parameter))
                continue
            stored = self.as_stored(parameter.detach())
            shards = cut_matrix(
                stored,
                without_bystanders(cut(*stored.shape)),
                spans_columns=basis_spans_columns(*stored.shape, "auto", transposed),
                replicated=replicated,
                transposed=transposed,
                home=1,
            )
            shards = [replace(each, name=name, phase=phase_of(name)) for each in shards]
            states: list[dict[str, Any]] = [{} for _ in shards]
            self.matrices.append((parameter, shards, states))
            self.state[parameter] = {name: states[0]}
        self.rest = AdaRankGrad([{"params": rest, "low_rank": False}], **settings)

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous() if self.transposed else matrix

    @torch.no_grad()
    def step(self) -> None:
        for parameter, shards, states in self.matrices:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradient = self.as_stored(gradient)
            step_in_lockstep(shards, states, gradient, self.settings, self.stagger)
            parameter.copy_(self.as_stored(weight_of(shards)))
            assert len({(state.get("rank"), state.get("gap")) for state in states}) == 1
        self.rest.step()


@cache
def simple_training(preset: str) -> Training:
    model = SmallModel()
    return training(model, AdaRankGradSimple(param_groups(model), **SETTINGS, **DEFAULTS[preset]))


def check_in_shards(preset: str, cut: str, **how: bool) -> None:
    model = SmallModel()
    sharded = training(model, InShards(model, CUTS[cut], **SETTINGS, **DEFAULTS[preset], **how))
    check_alike(sharded, simple_training(preset), in_codes=preset == "pretraining")


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("preset", DEFAULTS)
def test_every_cut_trains_as_the_simple_optimizer(preset, cut):
    check_in_shards(preset, cut)


@pytest.mark.parametrize("preset", DEFAULTS)
def test_columns_cut_and_matrices_that_all_hold_do_so_too(preset):
    check_in_shards(preset, "whole rows", transposed=True)
    check_in_shards(preset, "whole rows", replicated=True)
