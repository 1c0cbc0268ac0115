"""Precision of the optimizer's matrix products, independent of the job's own setting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

MatmulPrecision = Literal["highest", "high", "medium"]
"""As in ``torch.set_float32_matmul_precision``: rounding of fp32 factors; sums are fp32."""

CPU = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
CUDA = {"highest": "ieee", "high": "tf32", "medium": "tf32"}


AS_IT_IS: nullcontext[None] = nullcontext()


def lowered_precision(precision: MatmulPrecision) -> AbstractContextManager[None]:
    """:func:`matmul_precision` inside a step, all of which has the highest one."""
    return AS_IT_IS if precision == "highest" else matmul_precision(precision)


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
    effective = tuple(_effective(backend) for backend in backends)
    if (*effective, _older()) == (CPU[precision], CUDA[precision], precision):
        yield
        return
    own = [_own_value(backend) for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"  # torch reads its older flag only where nothing contradicts
    older = torch.get_float32_matmul_precision()
    # sets the older flag and both backends: torch raises where one contradicts the other
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for backend, value in zip(backends, own, strict=True):
            backend.fp32_precision = value


def _effective(backend: Any) -> str:
    name: str = backend.fp32_precision
    return "ieee" if name == "none" else name


def _older() -> str:
    """The precision that torch's older flag says; empty if a newer one contradicts it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return ""


def _own_value(backend: Any) -> str:
    """The value set for this backend's products, which is cleared; "none" if it is inherited."""
    effective: str = backend.fp32_precision
    backend.fp32_precision = "none"
    return "none" if backend.fp32_precision == effective else effective
