"""Adam's direction, against torch's Adam."""

from __future__ import annotations

import pytest
import torch
from matrices import gaussian
from one_process import optimizer_of, parameters_of, train
from tolerances import ROUNDING

from arg_dist import algorithm
from arg_dist.algorithm import AdamStep, adam_directions, adam_step
from arg_dist.config import AdaRankGradConfig
from arg_dist.sharding.drivers import run_local
from arg_dist.sharding.layout import shard_elements

GRADIENTS = [[gaussian(7, 5, seed=seed)] for seed in range(30)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95), (0.0, 0.5)])
def test_full_rank_training_is_adamw(betas, weight_decay):
    settings = {"lr": 1e-2, "betas": betas, "weight_decay": weight_decay, "eps": 1e-6}
    weight = gaussian(7, 5, seed=99)
    ours = optimizer_of(weight, low_rank=False, **settings)
    theirs = torch.optim.AdamW([torch.nn.Parameter(weight.clone())], foreach=False, **settings)
    ROUNDING.check(train(ours, GRADIENTS)[0], train(theirs, GRADIENTS)[0])
    state = ours.state[parameters_of(ours)[0]]["w0"]
    expected = theirs.state[parameters_of(theirs)[0]]
    for key in ("exp_avg", "exp_avg_sq"):
        ROUNDING.check(state[key].view(7, 5), expected[key])


def test_a_matrix_at_full_rank_is_trained_by_adam():
    full_rank, plain = (
        train(optimizer_of(gaussian(7, 5, seed=99), **settings), GRADIENTS)[0]
        for settings in ({"max_rank": 5}, {"low_rank": False})
    )
    assert torch.equal(full_rank, plain)


def test_the_first_direction_is_the_sign_of_the_gradient():
    gradient = gaussian(6, 4)
    direction, *moments = (torch.zeros(6, 4) for _ in range(3))
    lists = ([each] for each in (direction, gradient, *moments))
    adam_directions(*lists, AdamStep(1, betas=(0.9, 0.999), eps=0.0))
    ROUNDING.check(direction, gradient.sign())


def test_a_device_without_the_fused_kernel_trains_as_others_do(monkeypatch):
    def trained():
        weights = gaussian(40, 30, seed=99), gaussian(7, seed=98)
        steps = [[gaussian(40, 30, seed=seed), gaussian(7, seed=seed)] for seed in range(8)]
        return train(optimizer_of(*weights), steps)

    fused = trained()
    monkeypatch.setattr(algorithm, "FUSED_ON", ())
    for actual, expected in zip(trained(), fused, strict=True):
        ROUNDING.check(actual, expected)


def test_a_part_of_a_tensor_is_trained_as_within_the_whole():
    gradient, settings = gaussian(10), AdaRankGradConfig()
    whole, part = ({}, {})
    for _ in range(3):
        all_of_it = run_local(
            adam_step(gradient, whole, shard_elements(((0, 10),), 10, False), settings, me=0)
        )
        some = run_local(
            adam_step(gradient[3:7], part, shard_elements(((3, 7),), 10, False), settings, me=0)
        )
    assert torch.equal(some, all_of_it[3:7])
    assert torch.equal(part["exp_avg_sq"], whole["exp_avg_sq"][3:7])
