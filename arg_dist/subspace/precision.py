"""How precisely matrix products are taken, whatever the job has set for those of its model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

MatmulPrecision = Literal["highest", "high", "medium"]
"""As in ``torch.set_float32_matmul_precision``: how fp32 factors are rounded; sums are fp32."""

CPU = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
CUDA = {"highest": "ieee", "high": "tf32", "medium": "tf32"}


@contextmanager
def matmul_precision(precision: MatmulPrecision) -> Iterator[None]:
    """Takes products of fp32 matrices with this precision, and leaves the job's own as it was.

    ======= ============================== ======================
    value   on a CPU                       on a GPU
    ======= ============================== ======================
    highest fp32                           fp32
    high    TF32, where oneDNN has it      TF32
    medium  bf16, where oneDNN has it      TF32
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
