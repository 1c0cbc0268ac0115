"""Matrices that tests share: Gaussian, whole-numbered, and with a chosen spectrum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 24))


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """fp32 entries from -8 to 8: sums and products of them are exact in any order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def with_spectrum(
    rows: int, columns: int, singular: Iterable[float] | Tensor, seed: int = 0
) -> Tensor:
    """``rows x columns`` with random singular vectors and the given singular values."""
    values = torch.as_tensor(singular, dtype=torch.float64)
    left = torch.linalg.qr(gaussian(rows, len(values), seed=seed).double()).Q
    right = torch.linalg.qr(gaussian(columns, len(values), seed=seed + 1).double()).Q
    return (left * values @ right.T).float()


def geometric(count: int, ratio: float) -> Tensor:
    return ratio ** torch.arange(count, dtype=torch.float64)


def changing_spectrum(rows: int, columns: int, ratios: Sequence[float], each: int) -> list[Tensor]:
    """`each` gradients for each ratio of one singular value to the next, with noise of 1 %.

    A small ratio concentrates the energy in few directions, so that the adaptive rank changes.
    """
    short = min(rows, columns)
    return [
        with_spectrum(rows, columns, geometric(short, ratio), seed=7)
        + 0.01 * gaussian(rows, columns, seed=100 + len(ratios) * step + phase)
        for phase, ratio in enumerate(ratios)
        for step in range(each)
    ]
