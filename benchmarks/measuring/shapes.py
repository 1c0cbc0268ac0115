"""The matrices of a Llama's layers, and how many there are of each shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from arg_dist.cli.parsing import InputError
from arg_dist.planning.llama import LLAMA_SIZES

COLD_BYTES = 64 * 2**20
"""Matrices of one shape are taken in such a number that their weights fill this much memory: in a
step of a whole model, nothing is left in a cache from the step before."""


class Place(NamedTuple):
    """Where matrices lie, and in which type."""

    device: torch.device
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """``fp32`` or ``bf16``, as on the command line."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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


class Case(NamedTuple):
    """A shape of a model, and the rank that low-rank methods have in it."""

    model: str
    shape: Shape
    rank: int


def layer_shapes(model: str, layers: int | None = None) -> list[Shape]:
    """The low-rank matrices of a size in ``LLAMA_SIZES``: attention, then the MLP's up and down.

    Args:
        model: name of the size.
        layers: how many layers; None for the size's own number.
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
    """Looks whether each of `ranks` is below the sides of some model's matrices.

    Raises:
        InputError: one is not.
    """
    widest = max(models, key=lambda model: LLAMA_SIZES[model].hidden)
    sides = LLAMA_SIZES[widest].hidden
    for rank in ranks:
        if rank >= sides:
            raise InputError(
                f"{option} {rank}: the matrices of {widest} have sides from {sides} on, and a "
                f"low-rank method needs a smaller rank; give at most {sides - 1}"
            )


def cases(models: Sequence[str], ranks: Sequence[int]) -> Iterator[Case]:
    """Every shape of every model with every rank that it has."""
    for model in models:
        for rank in ranks:
            for shape in layer_shapes(model):
                if rank < min(shape.rows, shape.columns):
                    yield Case(model, shape, rank)


def left_out(models: Sequence[str], ranks: Sequence[int]) -> list[str]:
    """A sentence for each pair of a model and a rank of which :func:`cases` has none."""
    return [
        f"{model} has no rank {rank}: its matrices have sides from {LLAMA_SIZES[model].hidden} on."
        for model in models
        for rank in ranks
        if rank >= LLAMA_SIZES[model].hidden
    ]


def copies(shape: Shape, element_size: int) -> int:
    """How many matrices of a shape are timed together."""
    cold = math.ceil(COLD_BYTES / (shape.numel * element_size))
    return max(1, min(shape.count, cold))
