"""Precision of the optimizer's matrix products, independent of the job's own setting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

MatmulPrecision = Literal["highest", "high", "medium"]
"""As in ``torch.set_float32_matmul_precision``: rounding of fp32 factors; sums are fp32."""

CPU = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
CUDA = {"highest": "ieee", "high": "tf32", "medium": "tf32"}


@contextmanager
def matmul_precision(precision: MatmulPrecision) -> Iterator[None]:
    """Set the precision of fp32 matrix products in the context, then restore the job's setting.

    ======= ============================== ======================
    value   on a CPU                       on a GPU
    ======= ============================== ======================
    highest fp32                           fp32
    high    TF32, if oneDNN supports it    TF32
    medium  bf16, if oneDNN supports it    TF32
    ======= ============================== ======================
    """
    cpu, cuda = torch.backends.mkldnn, torch.backends.cuda.matmul
    if not hasattr(cuda, "fp32_precision"):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    backends: tuple[Any, Any] = (cpu.matmul, cuda)  # type: ignore[attr-defined]
    both = [(backend, backend.fp32_precision) for backend in backends]
    for (backend, _), names in zip(both, (CPU, CUDA), strict=True):
        backend.fp32_precision = names[precision]
    try:
        yield
    finally:
        for backend, earlier in both:
            backend.fp32_precision = earlier
