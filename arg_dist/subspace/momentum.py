"""Momentum of the residual in few bits an element: uniform levels without a zero, by blocks.

Sixteen levels ``+-(k + 1/2) d`` with ``d = 0.3352 rms`` of 64 elements are the uniform code of 4
bits that loses least of a Gaussian (Max, 1960): 1.2 % of its energy. No level is zero, so that
every element keeps its sign.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64
"""Elements that share a scale."""
LEVELS = 16
STEP = 0.3352
"""Distance of two levels, in units of a block's rms."""
BYTES_PER_BLOCK = BLOCK // 2 + 2
"""Two codes a byte, and the scale in bf16."""


class Coded(NamedTuple):
    """A tensor in 4 bits an element.

    Attributes:
        codes: ``blocks x 32``, uint8; the lower half byte is the first of two elements.
        scales: ``blocks``, bf16, d.
    """

    codes: Tensor
    scales: Tensor


def blocks_of(elements: int) -> int:
    """Number of blocks of so many elements; the last may be shorter."""
    return -(-elements // BLOCK)


def momentum_bytes(elements: int, momentum: float) -> int:
    """Bytes of the momentum of so many elements; 0 without one."""
    return BYTES_PER_BLOCK * blocks_of(elements) if momentum else 0


def coded_zeros(elements: int, device: torch.device) -> Coded:
    """Zeros."""
    blocks = blocks_of(elements)
    codes = torch.zeros(blocks, BLOCK // 2, dtype=torch.uint8, device=device)
    return Coded(codes, torch.zeros(blocks, dtype=torch.bfloat16, device=device))


def encode(values: Tensor) -> Coded:
    """Round every element to the nearest level.

    Args:
        values: ``elements``, fp32.
    """
    elements = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -elements % BLOCK)).view(-1, BLOCK)
    counts = torch.full((len(blocks),), float(BLOCK), dtype=torch.float32, device=values.device)
    counts[-1:] -= -elements % BLOCK
    # d = 0.3352 rms
    squares = torch.linalg.vector_norm(blocks, dim=1).square_()
    scales = squares.div_(counts).sqrt_().mul_(STEP).to(torch.bfloat16)
    # x = (k + 1/2) d for a whole number k from -8 to 7
    whole = blocks / torch.where(scales > 0, scales, 1.0)[:, None].float()
    whole.floor_().clamp_(-LEVELS // 2, LEVELS // 2 - 1)
    codes = whole.add_(LEVELS // 2).to(torch.uint8)
    return Coded(codes[:, ::2] + LEVELS * codes[:, 1::2], scales)


def decode(coded: Coded, elements: int) -> Tensor:
    """``elements``, fp32."""
    codes = torch.stack((coded.codes % LEVELS, coded.codes // LEVELS), dim=2).view(-1, BLOCK)
    levels = codes.float().sub_(LEVELS / 2 - 0.5).mul_(coded.scales[:, None].float())
    return levels.view(-1)[:elements]
