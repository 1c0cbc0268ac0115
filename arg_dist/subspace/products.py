"""Squares and products of a steady step, for all matrices of a shape at a time; their precision.

========= ==========================================================================
squares   ``||G_i||^2`` and ``||G||^2``; G is read once
project   ``P = G Q`` and ``||G_i||^2`` for the rows of G, which is read once
apply     ``W <- keep W + step (N Q^T + phi E)``; W is read and written once
========= ==========================================================================

Each chooses: Triton kernels on CUDA devices where Triton is installed and works, for matrices in
fp32 or bf16 (:mod:`arg_dist.subspace.grouped_kernels`: one launch for a list, in which a gradient
in bf16 is multiplied as it is); else PyTorch. Matrices are oriented as ``moment x basis``: where
the basis is on the left, pass transposed views. Nothing waits for the device but the first call for
it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from arg_dist.subspace.norms import all_squares, row_squares

# -- the choice ------------------------------------------------------------------------------------

OLDEST = (8, 0)
"""Compute capability of the first GPUs that multiply bf16 and TF32."""
TYPES = (torch.float32, torch.bfloat16)
OLDEST_TRITON = (3, 7)
"""First version of Triton whose compiler takes the kernels: torch 2.13's."""


def available(device: torch.device) -> bool:
    """Whether the kernels run on a device; the first call for a CUDA device compiles one.

    Triton is optional: without it or with an older one, on other devices and on older GPUs the
    answer is no. Where it is installed but cannot compile or launch, a warning says why, once.
    """
    if device.type != "cuda" or torch.version.hip is not None or not is_installed():
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return _works(torch.device("cuda", index))


@cache
def is_installed() -> bool:
    """Whether there is a Triton that the kernels are written for."""
    if find_spec("triton") is None:
        return False
    try:
        major, minor, *_ = version("triton").split(".")
    except PackageNotFoundError:  # a build of another name, of which the first product tells
        return True
    return (int(major), int(minor)) >= OLDEST_TRITON


@cache
def _works(device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device) < OLDEST:
        return False
    ones = [torch.ones(16, 16, dtype=torch.float32, device=device)]
    try:
        from arg_dist.subspace import grouped_kernels

        products, squares = grouped_kernels.project(ones, ones)
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
    squares: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`plain_project`, by the kernel where it is available."""
    if _suit(gradients) and _are_fp32(bases):
        from arg_dist.subspace import grouped_kernels

        return grouped_kernels.project(gradients, bases, precision=precision, parts=parts)
    return plain_project(gradients, bases, precision=precision, parts=parts, squares=squares)


def squares(gradients: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """``||G_i||^2`` of the rows, ``m`` in fp32, and ``||G||^2``, an fp64 scalar, of k gradients.

    Args:
        gradients: k times ``m x n``, G, oriented as ``moment x basis``; any strides.
    """
    if _suit(gradients):
        from arg_dist.subspace import grouped_kernels

        of_rows = grouped_kernels.squares(gradients)
        return list(of_rows.float()), list(of_rows.sum(1))
    return all_squares(gradients)


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
) -> None:
    """As :func:`plain_apply`, by the kernel where it is available."""
    operands = weights, directions, bases, rows, outside
    if _suit([*weights, *(outside or ())]) and _are_fp32([*directions, *bases, *(rows or ())]):
        from arg_dist.subspace import grouped_kernels

        grouped_kernels.apply(*operands, keep=keep, step=step, precision=precision)
    else:
        plain_apply(*operands, keep=keep, step=step, precision=precision)


def _suit(matrices: Sequence[Tensor]) -> bool:
    """Whether the kernels take matrices of these types, on the device of the first."""
    has_types = all(each.dtype in TYPES for each in matrices)
    return bool(matrices) and has_types and available(matrices[0].device)


def _are_fp32(matrices: Sequence[Tensor]) -> bool:
    return all(each.dtype == torch.float32 for each in matrices)


# -- in PyTorch ------------------------------------------------------------------------------------


def plain_project(
    gradients: Sequence[Tensor],
    bases: Sequence[Tensor],
    *,
    precision: MatmulPrecision = "highest",
    parts: int | None = None,
    squares: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``P = G Q`` and ``||G_i||^2``, of k gradients of one shape; sums are fp32.

    Args:
        gradients: k times ``m x n``, G, oriented as ``moment x basis``; any strides.
        bases: k times ``n x r``, Q, fp32; any strides.
        precision: of products of fp32 factors, as the setting ``matmul_precision``.
        parts: numbers in bf16 of which the sum stands for one of Q where G is in bf16: 2 (an error
            of 2e-6), which is fp32 here, or 1; None: 1 at medium precision, else 2.
        squares: whether the rows' squares are wanted, for which this path reads G once more.

    Returns:
        ``k x m x r``, each P; and ``k x m``, the rows' squares, if they are wanted, or have cost
        nothing; both fp32.

    Raises:
        ValueError: the lists or shapes do not belong together.
    """
    check_projected(gradients, bases)
    products, totals = empty_products(gradients, bases)
    with lowered_precision(precision):
        for G, Q, P, total in zip(gradients, bases, products, totals, strict=True):
            if G.dtype == torch.bfloat16 and bf16_parts(precision, parts) == 1:
                Q = Q.bfloat16().float()
            # P = G Q
            torch.mm(G.float(), Q, out=P)
            if squares:
                total.copy_(row_squares(G))
    return products, totals if squares else None


def plain_apply(
    weights: Sequence[Tensor],
    directions: Sequence[Tensor],
    bases: Sequence[Tensor],
    rows: Sequence[Tensor] | None = None,
    outside: Sequence[Tensor] | None = None,
    *,
    keep: float,
    step: float,
    precision: MatmulPrecision = "highest",
) -> None:
    """``W <- keep W + step (N Q^T + phi E)``, of k matrices of one shape, in place.

    Args:
        weights: k times ``m x n``, W, oriented as ``moment x basis``; any strides.
        directions: k times ``m x r``, N, fp32.
        bases: k times ``n x r``, Q, fp32.
        rows: k times ``m``, phi, fp32; None: one.
        outside: k times ``m x n``, E: the gradient where `rows` are given, else the orthogonalized
            residual; None: zero.
        keep: ``1 - lr wd``.
        step: ``-lr scale``.
        precision: as of :func:`plain_project`.

    Raises:
        ValueError: the lists or shapes do not belong together.
    """
    check_applied(weights, directions, bases, rows, outside)
    with lowered_precision(precision):
        for i, (W, N, Q) in enumerate(zip(weights, directions, bases, strict=True)):
            phi, E = (None if each is None else each[i] for each in (rows, outside))
            _apply_one(W, N, Q, phi, E, keep, step)


def _apply_one(
    W: Tensor, N: Tensor, Q: Tensor, phi: Tensor | None, E: Tensor | None, keep: float, step: float
) -> None:
    """``W <- keep W + step (N Q^T + phi E)``, in at least fp32, in place."""
    if W.dtype == torch.float32:
        W.addmm_(N, Q.T, beta=keep, alpha=step)
        _add(W, phi, E, step)
        return
    # in the order in which W is stored
    product = (Q @ N.T).T if W.stride(0) == 1 else N @ Q.T
    update = _add(product, phi, E, 1.0)
    wide = W if W.dtype == torch.float64 else W.float()
    W.copy_(wide.mul_(keep).add_(update, alpha=step))


def _add(total: Tensor, factors: Tensor | None, E: Tensor | None, step: float) -> Tensor:
    """``total + step phi E``, in place."""
    if E is None:
        return total
    E = E.float()
    if factors is None:
        return total.add_(E, alpha=step)
    return total.addcmul_(factors[:, None], E, value=step)


def bf16_parts(precision: MatmulPrecision, parts: int | None) -> int:
    """`parts` of :func:`plain_project`, chosen by the precision if None."""
    if parts is None:
        return 1 if precision == "medium" else 2
    if parts not in (1, 2):
        raise ValueError(f"parts: got {parts}; a basis is one or two parts in bf16: pass 1 or 2")
    return parts


def empty_products(gradients: Sequence[Tensor], bases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``k x m x r`` and ``k x m``, to be filled by :func:`project`; without matrices, empty."""
    if not gradients:
        products = torch.empty(0, 0, 0, dtype=torch.float32, device="cpu")
        return products, torch.empty(0, 0, dtype=torch.float32, device="cpu")
    count, rows, rank = len(gradients), gradients[0].shape[0], bases[0].shape[1]
    device = gradients[0].device
    products = torch.empty(count, rows, rank, dtype=torch.float32, device=device)
    return products, torch.empty(count, rows, dtype=torch.float32, device=device)


def check_projected(gradients: Sequence[Tensor], bases: Sequence[Tensor]) -> None:
    """Refuse what :func:`plain_project` cannot take."""
    rows, columns = gradients[0].shape if gradients else (0, 0)
    rank = bases[0].shape[1] if bases else 0
    check_shapes("gradients", gradients, len(gradients), (rows, columns))
    check_shapes("bases", bases, len(gradients), (columns, rank))


def check_applied(
    weights: Sequence[Tensor],
    directions: Sequence[Tensor],
    bases: Sequence[Tensor],
    rows: Sequence[Tensor] | None,
    outside: Sequence[Tensor] | None,
) -> None:
    """Refuse what :func:`plain_apply` cannot take."""
    if rows is not None and outside is None:
        raise ValueError("rows without outside, which they scale: pass both or neither")
    count = len(weights)
    height, width = weights[0].shape if weights else (0, 0)
    rank = bases[0].shape[1] if bases else 0
    check_shapes("weights", weights, count, (height, width))
    check_shapes("directions", directions, count, (height, rank))
    check_shapes("bases", bases, count, (width, rank))
    if rows is not None:
        check_shapes("rows", rows, count, (height,))
    if outside is not None:
        check_shapes("outside", outside, count, (height, width))


def check_shapes(name: str, given: Sequence[Tensor], count: int, shape: tuple[int, ...]) -> None:
    """Refuse a list that has not so many tensors of a shape."""
    shapes = [each.shape for each in given]
    if shapes != [shape] * count:
        raise ValueError(
            f"{name}: got the shapes {[tuple(each) for each in shapes]}; {count} of {shape} belong "
            "with the first operand: call once for all matrices of a shape and rank"
        )


# -- precision -------------------------------------------------------------------------------------

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
