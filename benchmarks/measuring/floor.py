"""What a step cannot do without: on CPUs two products, on GPUs reading and writing memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measuring.shapes import Place, Shape
from benchmarks.measuring.timing import in_turns

COPY_BYTES = 2**28
"""More than fits into a cache."""


def two_products(shape: Shape, rank: int, copies: int, place: Place) -> Callable[[], None]:
    """``G Q`` and ``N Q^T`` for so many matrices, into memory that is there already.

    The basis spans the shorter side, as in the optimizer.
    """
    rows, columns = shape.rows, shape.columns
    tall = rows >= columns
    long, short = max(rows, columns), min(rows, columns)

    def gaussian(*size: int) -> Tensor:
        return torch.randn(size, device=place.device, dtype=place.dtype)

    gradients = [gaussian(rows, columns) for _ in range(copies)]
    weights = [torch.empty_like(gradient) for gradient in gradients]
    basis, direction = gaussian(short, rank), gaussian(long, rank)
    projected = torch.empty_like(direction)
    left, right = (direction, basis) if tall else (basis, direction)

    def run() -> None:
        for gradient, weight in zip(gradients, weights, strict=True):
            torch.mm(gradient if tall else gradient.T, basis, out=projected)
            torch.mm(left, right.T, out=weight)

    return run


def copy_seconds_per_byte(device: torch.device, size: int = COPY_BYTES) -> float:
    """Of reading or writing a byte of the device's memory, from a copy of so many bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = in_turns({"copy": lambda: target.copy_(source)}, rounds=9)
    return times["copy"].median / (2 * size)


def moved_bytes(shape: Shape, copies: int, dtype: torch.dtype) -> int:
    """Bytes of one step that are read and written in any case: G once, W twice."""
    return 3 * shape.numel * copies * dtype.itemsize
