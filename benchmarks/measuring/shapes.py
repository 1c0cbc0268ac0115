"""Shapes of the matrices in a Llama's layers, with the number of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from arg_dist.cli.parsing import InputError
from arg_dist.planning.llama import LLAMA_SIZES

COLD_BYTES = 64 * 2**20
"""Enough matrices of a shape are timed together for their weights to fill this much memory: in a
step of a whole model, no cache retains data from the step before."""


class Place(NamedTuple):
    """Device and data type of matrices."""

    device: torch.device
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """``fp32`` or ``bf16``, as on the command line."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """``rows x columns``, and the number of such matrices in the model."""

    rows: int
    columns: int
    count: int

    @property
    def numel(self) -> int:
        """Number of elements in one matrix."""
        return self.rows * self.columns

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns}"


class Case(NamedTuple):
    """A shape of a model, and the rank that low-rank methods use for it."""

    model: str
    shape: Shape
    rank: int


def layer_shapes(model: str, layers: int | None = None) -> list[Shape]:
    """The low-rank matrices of a size in ``LLAMA_SIZES``: attention, then the MLP's up and down.

    Args:
        model: name of the size.
        layers: number of layers; None for that of the size.
    """
    size = LLAMA_SIZES[model]
    count = size.layers if layers is None else layers
    shared = size.key_value_width != size.hidden
    keys = [Shape(size.key_value_width, size.hidden, 2 * count)] if shared else []
    return [
        Shape(size.hidden, size.hidden, (2 if shared else 4) * count),
        *keys,
        Shape(size.intermediate, size.hidden, 2 * count),
        Shape(size.hidden, size.intermediate, count),
    ]


def check_ranks(models: Sequence[str], ranks: Sequence[int], option: str = "--ranks") -> None:
    """Check that each rank is below the hidden size of at least one model.

    Raises:
        InputError: one is not.
    """
    widest = max(models, key=lambda model: LLAMA_SIZES[model].hidden)
    sides = LLAMA_SIZES[widest].hidden
    for rank in ranks:
        if rank >= sides:
            raise InputError(
                f"{option} {rank}: must be below the hidden size of {widest}, {sides}; use at most "
                f"{sides - 1}"
            )


def cases(models: Sequence[str], ranks: Sequence[int]) -> Iterator[Case]:
    """Every shape of every model with every rank below its shorter side."""
    for model in models:
        for rank in ranks:
            for shape in layer_shapes(model):
                if rank < min(shape.rows, shape.columns):
                    yield Case(model, shape, rank)


def left_out(models: Sequence[str], ranks: Sequence[int]) -> list[str]:
    """A note for each pair of a model and a rank that :func:`cases` omits."""
    return [
        f"{model}: rank {rank} omitted, it must be below the hidden size, "
        f"{LLAMA_SIZES[model].hidden}."
        for model in models
        for rank in ranks
        if rank >= LLAMA_SIZES[model].hidden
    ]


def copies(shape: Shape, element_size: int) -> int:
    """Number of matrices of a shape to time together."""
    cold = math.ceil(COLD_BYTES / (shape.numel * element_size))
    return max(1, min(shape.count, cold))
