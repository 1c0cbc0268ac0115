"""Lower bounds on the time of a step: two products on CPUs, memory traffic on GPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measuring.shapes import Place, Shape
from benchmarks.measuring.timing import in_turns

COPY_BYTES = 2**28
"""Larger than any cache."""


def two_products(shape: Shape, rank: int, copies: int, place: Place) -> Callable[[], None]:
    """``G Q`` and ``N Q^T`` for `copies` matrices, into preallocated memory.

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
    """Seconds to read or write one byte of device memory, from copying `size` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = in_turns({"copy": lambda: target.copy_(source)}, rounds=9)
    return times["copy"].median / (2 * size)


def moved_bytes(shape: Shape, copies: int, dtype: torch.dtype) -> int:
    """Minimum bytes a step reads and writes: G once, W twice."""
    return 3 * shape.numel * copies * dtype.itemsize
