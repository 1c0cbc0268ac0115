"""Fingerprints of tensors, by which processes find that tensors which should be equal are not.

Two numbers per tensor: a sum weighted by position, which moves if rows are permuted or change their
sign, and the squared norm. Both read the tensor run by run and never wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from arg_dist.subspace.norms import DEVICE_RUN, RUN, in_host_memory, norm_sq

TOLERANCE = 1e-4
"""Largest difference of equal tensors, relative to their norm.

Averaged gradients have the same bits everywhere, but what follows may round differently on another
model of GPU or with another number of threads: clipping by a norm, decompression, unscaling.
"""

Numbers = Sequence[float]
"""The two numbers of a fingerprint."""


def fingerprint(values: Tensor) -> Tensor:
    """The position-weighted sum and the squared norm of a tensor, ``2``, fp64.

    Args:
        values: tensor of any shape and type; its elements count in row-major order.
    """
    flat = (torch.view_as_real(values) if values.is_complex() else values).reshape(-1)
    length = RUN if in_host_memory(flat) else DEVICE_RUN
    weights = _weights(min(length, flat.numel()), flat.device)
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for k, start in enumerate(range(0, flat.numel(), length)):
        run = flat[start : start + length].float()
        total += torch.dot(run, weights[: run.numel()]).double() * _weight(k + 1)
    return torch.stack([total, norm_sq(flat)])


def summary(fingerprints: Tensor, positions: Sequence[int]) -> Tensor:
    """One number of many fingerprints, an fp64 scalar.

    Args:
        fingerprints: ``k x m x 2``, m fingerprints of each of k units.
        positions: of the units among all; equal on all processes.
    """
    sums, norms_sq = fingerprints.unbind(-1)
    some = norms_sq > 0
    norms_sq = torch.where(some, norms_sq, 1.0)
    terms = torch.where(some, sums / norms_sq.sqrt() + 0.5 * norms_sq.log(), 0.0)
    kinds = range(fingerprints.shape[1])
    factors = [[1 + _weight(1 + i * len(kinds) + j) for j in kinds] for i in positions]
    return (terms * terms.new_tensor(factors, dtype=terms.dtype)).sum()


def differ(ours: Numbers, theirs: Numbers) -> bool:
    """Whether two fingerprints are of different tensors; NaN equals NaN."""
    norms_sq = (ours[1], theirs[1])
    if not all(0 < each < math.inf for each in norms_sq):
        return str(norms_sq[0]) != str(norms_sq[1])
    apart = ours[0] / math.sqrt(ours[1]) - theirs[0] / math.sqrt(theirs[1])
    return max(abs(apart), abs(0.5 * math.log(ours[1] / theirs[1]))) > TOLERANCE


def _weight(position: int) -> float:
    """In [-0.5, 0.5): fractional part of a quadratic phase, as irregular as random numbers."""
    return position * position * GOLDEN % 1.0 - 0.5


def _weights(numel: int, device: torch.device) -> Tensor:
    """:func:`_weight` of the first positions, fp32."""
    known = _KNOWN.get(device)
    if known is None or known.numel() < numel:
        positions = torch.arange(1, numel + 1, dtype=torch.float64, device=device)
        known = (positions.square_().mul_(GOLDEN).remainder_(1.0) - 0.5).float()
        _KNOWN[device] = known
    return known[:numel]


GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_KNOWN: dict[torch.device, Tensor] = {}
