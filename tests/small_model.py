"""A model with matrices of all forms, trained for fifty steps, to compare two optimizers on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from matrices import gaussian
from tolerances import CODES, CODES_DISTANCE, REDUCTION_ORDER, REFERENCE
from torch import Tensor, nn

STEPS = 50
SYMBOLS, WIDTH, OUTPUTS, ROWS = 19, 32, 24, 40

WHOLE_SKETCH = {"oversample": WIDTH}
"""The sketch spans the shorter side of each matrix: the randomized SVD is exact, up to rounding."""
REFRESHING = {"min_gap": 4, "max_gap": 12, "first_gap": None, "min_rank": 1, "energy": 0.65}
"""At least four refreshes of each matrix in fifty steps, with rank changes."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "pretraining": {"preset": "pretraining"},
    "paper": {"preset": "paper"},
    "finetuning": {"preset": "finetuning"},
}
"""Settings by name; momentum is kept in codes."""


class SmallModel(nn.Module):
    """Tall, wide and square matrices, a single row, vectors and a table.

    The gradient of `late` is zero in the first 7 steps and in steps 20 to 29; `dead` has none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(SYMBOLS, WIDTH)
        self.tall = nn.Linear(WIDTH, 2 * WIDTH)
        self.wide = nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.square = nn.Linear(WIDTH, WIDTH, bias=False)
        self.late = nn.Linear(WIDTH, OUTPUTS, bias=False)
        self.one_row = nn.Linear(WIDTH, 1)
        self.dead = nn.Linear(WIDTH, WIDTH)
        self.outputs = nn.Linear(WIDTH, OUTPUTS)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = gaussian(*parameter.shape, seed=i) * WIDTH**-0.5

    def forward(self, symbols: Tensor, step: int) -> Tensor:
        hidden = self.table(symbols)
        hidden = hidden + self.wide(self.tall(hidden).tanh())
        hidden = self.norm(hidden + self.square(hidden).tanh())
        scores = self.outputs(hidden) * self.one_row(hidden).sigmoid()
        is_used = 7 <= step < 20 or step >= 30
        return scores + self.late(hidden).tanh() * float(is_used)


def loss_of(model: nn.Module, step: int) -> Tensor:
    """The loss on the rows of one step; a quarter of it from step 25, so that bases end early."""
    symbols = torch.randint(0, SYMBOLS, (ROWS,), generator=torch.Generator().manual_seed(step))
    goal = gaussian(SYMBOLS, OUTPUTS, seed=99)[symbols]
    share = 1.0 if step < 25 else 0.25
    return share * (model(symbols, step) - goal).square().mean()


class Stepping(Protocol):
    """What trains: an optimizer, or what has the two parts of one that are needed here."""

    state: Any
    """``state[parameter][name]``: state of each matrix."""

    def step(self) -> Any: ...


@dataclass(frozen=True)
class Training:
    """What fifty steps of training have come to.

    Attributes:
        losses: before each step.
        bases: after each step, rank and number of refreshes of each matrix that has a basis.
        weights: at the end.
    """

    losses: list[float]
    bases: list[dict[str, tuple[int, int]]]
    weights: dict[str, Tensor]

    def ranks(self, name: str) -> set[int]:
        """The ranks that a matrix has had."""
        return {bases[name][0] for bases in self.bases if name in bases}


def training(model: nn.Module, optimizer: Stepping) -> Training:
    """Train the model."""
    losses, bases = [], []
    for step in range(STEPS):
        model.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        states = {name: s for held in optimizer.state.values() for name, s in held.items()}
        bases.append(
            {n: (s["basis"].shape[1], s["refreshes"]) for n, s in states.items() if "basis" in s}
        )
    return Training(losses, bases, {n: p.detach() for n, p in model.named_parameters()})


def check_alike(actual: Training, expected: Training, *, in_codes: bool = False) -> None:
    """Asserts equal ranks and refreshes, and equal losses and weights up to the order of sums.

    With momentum `in_codes`, they are equal up to its rounding, weights in the norm of each tensor:
    where a code differs, so does the one element, for about ten steps.
    """
    assert actual.bases == expected.bases
    losses = CODES if in_codes else REDUCTION_ORDER
    losses.check(torch.tensor(actual.losses), torch.tensor(expected.losses))
    for name, weight in expected.weights.items():
        if in_codes:
            distance = (actual.weights[name] - weight).norm()
            CODES_DISTANCE.check(weight.norm() + distance, weight.norm())
        else:
            REFERENCE.check(actual.weights[name], weight)
