"""Moments and bases in fewer bits: in bf16, or in 8 bits with a scale for each row.

An exponential average that is rounded to the nearest stands still where a step changes it by less
than half the distance of two numbers: with a decay of 0.999, second moments in bf16 would never
fall. So moments are rounded up or down at random (:mod:`arg_dist.subspace.rounding`).

In 8 bits, a number x of a row whose largest magnitude is s is kept as the whole number c::

    x = s (c / L)^p        L = 127 with a sign, 255 without

where p = 1 for bases, 2 for first and 4 for second moments, whose roots divide: small numbers
beside large ones keep their precision (a companding code, as in telephony; bitsandbytes' dynamic
map serves the same end). What is read and kept again unchanged keeps its codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from arg_dist.subspace.rounding import chances
from arg_dist.subspace.state import SCALES, State

Precision = Literal["fp32", "bf16", "int8"]
"""How a state is kept."""

BLOCK = 256
"""Elements of a tensor that share a scale; of a matrix, those of a row do."""
PIECE = 2**22
"""Elements of a tensor whose moments are in fp32 at a time."""
SMALLEST = 4096
"""Elements of the smallest tensor whose moments take fewer bits: not of norms and biases."""
NUMBER_BYTES: Mapping[Precision, int] = {"fp32": 4, "bf16": 2, "int8": 1}
SCALE_BYTES = 4

ROUNDING = 2e-4
"""Limit for the rounding errors of c after decoding and encoding."""

POWERS = {"basis": 1, "exp_avg": 2, "exp_avg_sq": 4}
"""p of each kind of number; second moments have no sign."""
LEVELS = {torch.int8: 127, torch.uint8: 255}
"""L by the type of the codes."""


def empty_moments(like: Tensor, precision: Precision) -> State:
    """Both moments of a tensor before its first step: zeros.

    Args:
        like: ``elements``, in the type of the moments.
        precision: how they are kept.
    """
    if precision != "int8" or like.dtype == torch.float64:
        dtype = torch.bfloat16 if precision == "bf16" and like.dtype != torch.float64 else None
        return {key: torch.zeros_like(like, dtype=dtype) for key in ("exp_avg", "exp_avg_sq")}
    state: State = {}
    for key, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
        state[key] = torch.zeros_like(like, dtype=dtype)
        state[SCALES[key]] = like.new_zeros(blocks_of(like.numel()))
    return state


def piece_of(state: Mapping[str, Tensor], span: slice) -> State:
    """Both moments of a tensor over a span of elements that begins with a block; views."""
    piece: State = {}
    for key in ("exp_avg", "exp_avg_sq"):
        piece[key] = state[key][span]
        if SCALES[key] in state:
            piece[SCALES[key]] = state[SCALES[key]][_blocks(span)]
    return piece


def put_piece(state: Mapping[str, Tensor], piece: State, span: slice) -> None:
    """The inverse of :func:`piece_of`, in place."""
    for key, part in piece.items():
        state[key][_blocks(span) if key in SCALES.values() else span] = part


def _blocks(span: slice) -> slice:
    return slice(span.start // BLOCK, blocks_of(span.stop))


def precision_of_tensor(elements: int, precision: Precision) -> Precision:
    """How the moments of a tensor are kept: those of a small one in fp32.

    Args:
        elements: of the part that this process keeps.
        precision: that was asked for.
    """
    return precision if elements >= SMALLEST else "fp32"


def blocks_of(elements: int) -> int:
    """Number of scales of a tensor's moment."""
    return -(-elements // BLOCK)


def row_bytes(width: int, precision: Precision) -> int:
    """Bytes of a row of so many numbers."""
    return width * NUMBER_BYTES[precision] + (SCALE_BYTES if precision == "int8" else 0)


def tensor_bytes(elements: int, precision: Precision) -> int:
    """Bytes of one moment of a tensor in fp32 parameters, of which a process keeps `elements`."""
    kept = precision_of_tensor(elements, precision)
    scales = SCALE_BYTES * blocks_of(elements) if kept == "int8" else 0
    return elements * NUMBER_BYTES[kept] + scales


# -- rounding -------------------------------------------------------------------------------------


def encode(numbers: Tensor, key: str, step: int) -> tuple[Tensor, Tensor]:
    """Codes of the same shape, int8 or uint8, and the scales: of each row, or of each block.

    Args:
        numbers: ``rows x width``, or ``elements``; fp32.
        key: the kind of number, see :data:`POWERS`.
        step: number of the step.
    """
    power, dtype = POWERS[key], torch.uint8 if key == "exp_avg_sq" else torch.int8
    rows = _in_rows(numbers)
    magnitude = rows.abs()
    scales = magnitude.amax(1)
    # y = L (|x| / s)^(1 / p)
    y = magnitude.div_(torch.where(scales > 0, scales, 1.0)[:, None])
    for _ in range(power.bit_length() - 1):
        y.sqrt_()
    y.mul_(LEVELS[dtype])
    codes = y.round()
    if key != "basis":
        is_kept = (y - codes).abs_() < ROUNDING  # it has been decoded, and nothing has changed it
        codes = torch.where(is_kept, codes, _up_or_down(y, power, chances(rows, step)))
    if dtype == torch.uint8:  # a second moment of zero would make its step endless
        codes = torch.maximum(codes, (rows > 0).to(codes.dtype))
    else:
        codes = codes.copysign_(rows)
    return codes.to(dtype).view(-1)[: numbers.numel()].view(numbers.shape), scales


def _up_or_down(y: Tensor, power: int, chance: Tensor) -> Tensor:
    """The whole number below or above each y, whose power is right on average.

    Args:
        y: at least 0.
        power: p.
        chance: evenly distributed over [0, 1), of the same shape.
    """
    down = y.floor()
    # (y^p - d^p) / ((d + 1)^p - d^p)
    low, high = down**power, (down + 1) ** power
    share = (y**power).sub_(low).div_(high.sub_(low))
    return down.add_(chance < share)


def decode(codes: Tensor, scales: Tensor, power: int) -> Tensor:
    """The numbers of :func:`encode`, fp32.

    Args:
        codes: ``rows x width``, or ``elements``.
        scales: ``rows``, or of each block.
        power: p of this kind of number.
    """
    # x = s (c / L)^p, with the sign of c
    x = _in_rows(codes.float()).div_(LEVELS[codes.dtype])
    if power == 2:
        x = x * x.abs()
    elif power == 4:
        x = x.square_().square_()
    return x.mul_(scales[:, None]).view(-1)[: codes.numel()].view(codes.shape)


def _in_rows(numbers: Tensor) -> Tensor:
    """``rows x width``: of a matrix, its own; of a tensor, blocks, of which the last is padded."""
    if numbers.dim() > 1:
        return numbers
    missing = -numbers.numel() % BLOCK
    if missing:
        numbers = torch.nn.functional.pad(numbers, (0, missing))
    return numbers.view(blocks_of(numbers.numel()), BLOCK)
