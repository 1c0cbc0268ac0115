"""The two products of a steady step, for all matrices of one shape at a time.

========= ==========================================================================
project   ``P = G Q`` and ``||G_i||^2`` for the rows of G, which is read once
apply     ``W <- keep W + step (N Q^T + phi E)``; W is read and written once
========= ==========================================================================

:mod:`~arg_dist.subspace.kernels.plain` computes them in PyTorch, and
:mod:`~arg_dist.subspace.kernels.grouped` in Triton kernels, one launch for a list, in which a
gradient in bf16 is multiplied as it is. :func:`project` and :func:`apply` choose: Triton on CUDA
devices where it is installed and works, for matrices in fp32 or bf16; else PyTorch. Arguments are
described there. Matrices are oriented as ``moment x basis``: where the basis is on the left, pass
transposed views. Nothing waits for the device but the first call for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from arg_dist.subspace.kernels import plain
from arg_dist.subspace.precision import MatmulPrecision

OLDEST = (8, 0)
"""Compute capability of the first GPUs that multiply bf16 and TF32."""
TYPES = (torch.float32, torch.bfloat16)


def available(device: torch.device) -> bool:
    """Whether the kernels run on a device; the first call for a CUDA device compiles one.

    Triton is optional: without it, on other devices and on older GPUs the answer is no. Where it is
    installed but cannot compile or launch, a warning says why, once.
    """
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return _works(torch.device("cuda", index))


@cache
def _works(device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device) < OLDEST:
        return False
    ones = [torch.ones(16, 16, dtype=torch.float32, device=device)]
    try:
        from arg_dist.subspace.kernels import grouped

        products, squares = grouped.project(ones, ones)
        return bool((products == 16).all() and (squares == 16).all())
    except Exception as error:  # no compiler, another version of Triton, a driver that is too old
        warnings.warn(
            f"Triton is installed but cannot run on {device} ({type(error).__name__}: {error}); "
            "matrix products take PyTorch's path. Install the version that this torch asks for, "
            "and a C compiler, or uninstall triton",
            stacklevel=2,
        )
        return False


def project(
    gradients: Sequence[Tensor],
    bases: Sequence[Tensor],
    *,
    precision: MatmulPrecision = "highest",
    parts: int | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """As :func:`arg_dist.subspace.kernels.plain.project`, by the kernel where it is available."""
    if _suit(gradients) and _are_fp32(bases):
        from arg_dist.subspace.kernels import grouped

        return grouped.project(gradients, bases, precision=precision, parts=parts, exact=exact)
    return plain.project(gradients, bases, precision=precision, parts=parts, exact=exact)


def apply(
    weights: Sequence[Tensor],
    directions: Sequence[Tensor],
    bases: Sequence[Tensor],
    rows: Sequence[Tensor] | None = None,
    outside: Sequence[Tensor] | None = None,
    *,
    keep: float,
    step: float,
    precision: MatmulPrecision = "highest",
    exact: bool = False,
) -> None:
    """As :func:`arg_dist.subspace.kernels.plain.apply`, by the kernel where it is available."""
    operands = weights, directions, bases, rows, outside
    if _suit([*weights, *(outside or ())]) and _are_fp32([*directions, *bases, *(rows or ())]):
        from arg_dist.subspace.kernels import grouped

        grouped.apply(*operands, keep=keep, step=step, precision=precision, exact=exact)
    else:
        plain.apply(*operands, keep=keep, step=step, precision=precision, exact=exact)


def _suit(matrices: Sequence[Tensor]) -> bool:
    """Whether the kernels take matrices of these types, on the device of the first."""
    has_types = all(each.dtype in TYPES for each in matrices)
    return bool(matrices) and has_types and available(matrices[0].device)


def _are_fp32(matrices: Sequence[Tensor]) -> bool:
    return all(each.dtype == torch.float32 for each in matrices)
