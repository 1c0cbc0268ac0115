"""Sums of squares that read each part of a gradient once, in runs that fit in the cache.

A gradient in fp16 or bf16 is converted run by run, so that no full fp32 copy of it exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from arg_dist.library_internals import FOREACH_NORM

RUN = 2**17
"""Elements per run on a CPU."""
DEVICE_RUN = 2**20
"""Elements per run on a device, where each run is a launch."""
FAINT = 1e-30
"""Mean square below which the squares of small entries underflow in fp32."""


def in_host_memory(part: Tensor) -> bool:
    """Whether reading a value needs no device synchronization; elsewhere, read no values."""
    return part.device.type == "cpu"


def to_host_memory(values: Tensor) -> Tensor:
    """A copy there, after waiting for the device; the tensor itself if it is there or has no data.

    Args:
        values: a small tensor of any shape and type.
    """
    return values if values.is_meta else values.cpu()


def row_squares(part: Tensor) -> Tensor:
    """``||G_i||^2`` for each row, fp32.

    Args:
        part: ``rows x columns``, any floating-point type and strides; fastest if its rows or its
            columns are contiguous.
    """
    rows, columns = part.shape
    if not in_host_memory(part):
        return _norms_of_rows(part).square().float()
    if part.numel() <= RUN:
        return part.float().square().sum(1)
    squares = part.new_zeros(rows, dtype=torch.float32)
    if part.stride(1) == 1:
        height = max(1, RUN // max(1, columns))
        scratch = squares.new_empty(min(height, rows), columns)
        for start in range(0, rows, height):
            run = part[start : start + height].float()
            square = torch.mul(run, run, out=scratch[: len(run)])
            torch.sum(square, 1, out=squares[start : start + height])
    else:
        height = max(1, RUN // max(1, rows))
        scratch = squares.new_zeros(min(height, columns), rows)
        for start in range(0, columns, height):
            run = part.T[start : start + height].float()
            scratch[: len(run)].addcmul_(run, run)
        squares = scratch.sum(0)
    return squares


def norm_sq(part: Tensor, squares: Tensor | None = None) -> Tensor:
    """``||G||^2``, an fp64 scalar.

    On a CPU it is squared in fp32, and recomputed in fp64 if that underflows or overflows, for very
    small or very large gradients. Elsewhere this would have to be read, so all squares are fp64.

    Args:
        part: tensor of any shape and floating-point type.
        squares: :func:`row_squares` of it, if known.
    """
    if not in_host_memory(part):
        (norm,) = _norms_on_device([part])
        return norm.square()
    if squares is None:
        squares = torch.stack([torch.dot(run, run) for run in map(Tensor.float, _runs(part))])
    total = squares.sum(dtype=torch.float64)
    if FAINT * part.numel() <= float(total) < math.inf:
        return total
    return torch.stack([run.double().square().sum() for run in _runs(part)]).sum()


def all_squares(parts: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """:func:`row_squares` and :func:`norm_sq` of matrices of one shape, type and device."""
    if in_host_memory(parts[0]):
        rows = [row_squares(part) for part in parts]
        return rows, list(map(norm_sq, parts, rows))
    norms = torch.stack([_norms_of_rows(part) for part in parts])
    totals = torch.stack(_norms_on_device(parts))
    return list(norms.square().float()), list(totals.square())


def _norms_of_rows(part: Tensor) -> Tensor:
    """``||G_i||`` for each row, fp32, or fp64 if the part is."""
    dtype = torch.promote_types(part.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(part, dim=1, dtype=dtype)
    return norms


def _norms_on_device(parts: Sequence[Tensor]) -> list[Tensor]:
    """``||G||``, fp64 scalars, without copies of the parts in fp64 and without reading a value."""
    in_order = [part.T if part.ndim == 2 and part.stride(0) == 1 else part for part in parts]
    if all(part.numel() and part.is_contiguous() for part in in_order):
        # its kernel alone converts element by element: vector_norm converts the tensor before
        norms: Sequence[Tensor] = FOREACH_NORM.of(torch)(in_order, 2, dtype=torch.float64)
        return list(norms)
    return list(map(_norm_in_runs, parts))


def _norm_in_runs(part: Tensor) -> Tensor:
    """``||G||`` of a part that is empty or in no order."""
    height = max(1, DEVICE_RUN * len(part) // max(1, part.numel()))
    runs = torch.split(part, height)
    norms = [torch.linalg.vector_norm(run, dtype=torch.float64) for run in runs]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _runs(part: Tensor) -> list[Tensor]:
    """The elements in the order in which they are stored; at least one run, which may be empty."""
    flat = (part if part.is_contiguous() or part.ndim != 2 else part.T).reshape(-1)
    return list(torch.split(flat, RUN))
