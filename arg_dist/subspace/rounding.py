"""Rounding up or down at random, right on average, and alike on every process.

What a small step adds to a large number is lost if the sum is rounded to the nearest; if it is
rounded up or down with the odds of the distance, it is kept on average (stochastic rounding, Gupta
et al. 2015). What looks random here is a hash of the number's own bits and of the step: no
generator advances, and however a tensor is cut, its elements are rounded alike.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_bf16(numbers: Tensor, step: int) -> Tensor:
    """Rounded to bf16; what bf16 can hold stays as it is.

    Args:
        numbers: fp32, of any shape.
        step: number of the step.
    """
    bits = numbers.contiguous().view(torch.int32)
    # x + u ulp, cut off below bf16's last bit
    raised = bits + hashed(bits, step)
    return raised.bitwise_and_(-0x10000).view(torch.float32).to(torch.bfloat16)


def chances(numbers: Tensor, step: int) -> Tensor:
    """For each number another one, evenly distributed over [0, 1), fp32.

    Args:
        numbers: fp32, of any shape.
        step: number of the step.
    """
    return hashed(numbers.contiguous().view(torch.int32), step).float().div_(2**16)


def hashed(bits: Tensor, step: int) -> Tensor:
    """For each int32 another one below 2^16 that depends on all of its bits, and on the step."""
    # products that overflow mix upwards, shifts downwards (Knuth 1973, 6.4; Appleby's MurmurHash)
    mixed = bits.add(_as_int32(step * 0x2545F491)).mul_(_as_int32(0x9E3779B9))
    mixed.bitwise_xor_(mixed >> 15).mul_(_as_int32(0x85EBCA6B))
    return mixed.bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def _as_int32(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31
