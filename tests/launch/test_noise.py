"""Rounding must not decide a run: the main job's model with and without a little gradient noise."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import arg_dist
from arg_dist.planning.llama import model_config
from launchers.pretraining.models import build_model

STEPS = 60


def train(noise: float, **settings: object) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of `nano` before and after `STEPS` steps on the text of this file."""
    text = torch.tensor(list(Path(__file__).read_bytes()))
    config = model_config("nano", vocab_size=256, length=48)
    model = build_model("nano", config, seed=0, deepspeed_config={})
    optimizer = arg_dist.AdaRankGrad(arg_dist.param_groups(model), max_rank=0.25, **settings)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        starts = [(step * 2 + i) * 131 % (len(text) - 48) for i in range(2)]
        tokens = torch.stack([text[start : start + 48] for start in starts])
        model(input_ids=tokens, labels=tokens).loss.backward()
        for parameter in model.parameters():
            gradient = parameter.grad
            disturbance = torch.randn(gradient.shape, generator=generator)
            disturbance *= gradient != 0  # what no token reached stays exactly zero
            gradient.add_(disturbance, alpha=noise * float(gradient.square().mean().sqrt()))
        optimizer.step()
        optimizer.zero_grad()
    return before, [parameter.detach() for parameter in model.parameters()]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return torch.sqrt(sum((x - y).square().sum() for x, y in zip(a, b, strict=True))).item()


def test_noise_of_1e_6_moves_nano_by_less_than_one_percent() -> None:
    often = {"min_rank": 24, "min_gap": 5, "max_gap": 10}
    start, quiet = train(0.0, **often)
    _, noisy = train(1e-6, **often)
    assert 0 < distance(quiet, noisy) < 0.01 * distance(start, quiet)
