"""Ranks while a model trains on real text, with the noise that batches bring."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import arg_dist
from benchmarks.compare.measuring import RankHistory, flap

pytestmark = pytest.mark.unit

LICENSE = Path(__file__).resolve().parents[2] / "LICENSE"
"""English text that no version of Python changes."""
STEPS, GAP, SEEN, BATCH = 300, 10, 8, 96
"""So many steps, a refresh after every `GAP`; `SEEN` bytes tell the next one."""


class NextByte(nn.Module):
    """Tells the next byte from those before it."""

    def __init__(self, width: int = 48, depth: int = 4) -> None:
        super().__init__()
        self.bytes = nn.Embedding(128, 16)
        self.first = nn.Linear(16 * SEEN, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, 128)

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.first(self.bytes(text).flatten(1)).relu()
        for layer in self.layers:
            hidden = hidden + layer(hidden).relu()
        return self.last(hidden)


def train(**settings: float) -> tuple[RankHistory, float]:
    """The ranks of all refreshes, and by how much the loss has fallen."""
    torch.manual_seed(0)
    text = torch.tensor(list(LICENSE.read_bytes()))
    model, ranks, losses = NextByte(), {}, []
    optimizer = arg_dist.AdaRankGrad(
        arg_dist.param_groups(model), lr=1e-2, min_rank=2, min_gap=GAP, max_gap=GAP, **settings
    )
    for step in range(1, STEPS + 1):
        start = torch.randint(len(text) - SEEN, (BATCH, 1))
        batch = text[start + torch.arange(SEEN + 1)]
        loss = nn.functional.cross_entropy(model(batch[:, :SEEN]), batch[:, SEEN])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % GAP == 1:
            for entry in optimizer.stats():
                point = (step, entry["rank"], entry["energy"])
                ranks.setdefault(entry["name"], []).append(point)
    return ranks, losses[0] - losses[-1]


def test_ranks_hold_still_where_batches_alone_would_move_them():
    moved = {}
    for hysteresis in (0.0, arg_dist.AdaRankGradConfig().hysteresis):
        ranks, learnt = train(hysteresis=hysteresis, energy=0.8, residual_momentum=0.0)
        assert learnt > 1.5
        assert max(rank for points in ranks.values() for _, rank, _ in points) >= 6
        moved[hysteresis] = flap(ranks, STEPS)
    without, with_hysteresis = moved.values()
    assert without > 0.15
    assert with_hysteresis < 0.1
