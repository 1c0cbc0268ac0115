"""The matrices of a Llama's layers, and how many there are of each shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from arg_dist.lm.presets import LLAMA_SIZES

COLD_BYTES = 64 * 2**20
"""Matrices of one shape are taken in such a number that their weights fill this much memory: in a
step of a whole model, nothing is left in a cache from the step before."""


class Place(NamedTuple):
    """Where matrices lie, and in which type."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Shape:
    """``rows x columns``, and how many such matrices the model has."""

    rows: int
    columns: int
    count: int

    @property
    def numel(self) -> int:
        """Elements of one matrix."""
        return self.rows * self.columns

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns}"


def layer_shapes(model: str) -> list[Shape]:
    """The low-rank matrices of a size in ``LLAMA_SIZES``: attention, then the MLP's up and down."""
    size = LLAMA_SIZES[model]
    return [
        Shape(size.hidden, size.hidden, 4 * size.layers),
        Shape(size.intermediate, size.hidden, 2 * size.layers),
        Shape(size.hidden, size.intermediate, size.layers),
    ]


def copies(shape: Shape, element_size: int, *, at_most: int | None = None) -> int:
    """How many matrices of a shape are timed together."""
    cold = math.ceil(COLD_BYTES / (shape.numel * element_size))
    return max(1, min(shape.count, cold, at_most or shape.count))
