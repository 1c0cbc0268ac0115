"""The products of a steady step, matrix by matrix in PyTorch: on any device, for any types."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arg_dist.subspace.norms import row_squares
from arg_dist.subspace.precision import MatmulPrecision, lowered_precision


def project(
    gradients: Sequence[Tensor],
    bases: Sequence[Tensor],
    *,
    precision: MatmulPrecision = "highest",
    parts: int | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """``P = G Q`` and ``||G_i||^2``, of k gradients of one shape; sums are fp32.

    Args:
        gradients: k times ``m x n``, G, oriented as ``moment x basis``; any strides.
        bases: k times ``n x r``, Q, fp32; any strides.
        precision: of products of fp32 factors, as the setting ``matmul_precision``.
        parts: numbers in bf16 of which the sum stands for one of Q where G is in bf16: 2 (an error
            of 2e-6), which is fp32 here, or 1; None: 2 at the highest precision, else 1.
        exact: multiply factors in fp32 by fp32's own units instead of tensor cores, whatever the
            precision; this path does so at the highest one.

    Returns:
        ``k x m x r``, each P; and ``k x m``, the rows' squares; both fp32.

    Raises:
        ValueError: the lists or shapes do not belong together.
    """
    check_projected(gradients, bases)
    products, squares = empty_products(gradients, bases)
    with lowered_precision(precision):
        for G, Q, P, square in zip(gradients, bases, products, squares, strict=True):
            if G.dtype == torch.bfloat16 and bf16_parts(precision, parts) == 1:
                Q = Q.bfloat16().float()
            # P = G Q
            torch.mm(G.float(), Q, out=P)
            square.copy_(row_squares(G))
    return products, squares


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
        precision: as of :func:`project`.
        exact: as of :func:`project`.

    Raises:
        ValueError: the lists or shapes do not belong together.
    """
    check_applied(weights, directions, bases, rows, outside)
    with lowered_precision(precision):
        for i, (W, N, Q) in enumerate(zip(weights, directions, bases, strict=True)):
            # W <- keep W + step (N Q^T + phi E), in at least fp32
            E = None if outside is None else outside[i].float()
            if W.dtype == torch.float32:
                W.addmm_(N, Q.T, beta=keep, alpha=step)
                _add(W, None if rows is None else rows[i], E, step)
            else:
                update = _add(N @ Q.T, None if rows is None else rows[i], E, 1.0)
                wide = W if W.dtype == torch.float64 else W.float()
                W.copy_(wide.mul_(keep).add_(update, alpha=step))


def _add(total: Tensor, factors: Tensor | None, E: Tensor | None, step: float) -> Tensor:
    """``total + step phi E``, in place."""
    if E is None:
        return total
    if factors is None:
        return total.add_(E, alpha=step)
    return total.addcmul_(factors[:, None], E, value=step)


def bf16_parts(precision: MatmulPrecision, parts: int | None) -> int:
    """`parts` of :func:`project`, chosen by the precision if None."""
    if parts is None:
        return 2 if precision == "highest" else 1
    if parts not in (1, 2):
        raise ValueError(f"parts: got {parts}; a basis is one or two parts in bf16: pass 1 or 2")
    return parts


def empty_products(gradients: Sequence[Tensor], bases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``k x m x r`` and ``k x m``, for what :func:`project` returns; without matrices, empty."""
    if not gradients:
        products = torch.empty(0, 0, 0, dtype=torch.float32, device="cpu")
        return products, torch.empty(0, 0, dtype=torch.float32, device="cpu")
    count, rows, rank = len(gradients), gradients[0].shape[0], bases[0].shape[1]
    device = gradients[0].device
    products = torch.empty(count, rows, rank, dtype=torch.float32, device=device)
    return products, torch.empty(count, rows, dtype=torch.float32, device=device)


def check_projected(gradients: Sequence[Tensor], bases: Sequence[Tensor]) -> None:
    """Refuse what :func:`project` cannot take."""
    rows, columns = gradients[0].shape if gradients else (0, 0)
    rank = bases[0].shape[1] if bases else 0
    _check("gradients", gradients, len(gradients), (rows, columns))
    _check("bases", bases, len(gradients), (columns, rank))


def check_applied(
    weights: Sequence[Tensor],
    directions: Sequence[Tensor],
    bases: Sequence[Tensor],
    rows: Sequence[Tensor] | None,
    outside: Sequence[Tensor] | None,
) -> None:
    """Refuse what :func:`apply` cannot take."""
    if rows is not None and outside is None:
        raise ValueError("rows without outside, which they scale: pass both or neither")
    count = len(weights)
    height, width = weights[0].shape if weights else (0, 0)
    rank = bases[0].shape[1] if bases else 0
    _check("weights", weights, count, (height, width))
    _check("directions", directions, count, (height, rank))
    _check("bases", bases, count, (width, rank))
    if rows is not None:
        _check("rows", rows, count, (height,))
    if outside is not None:
        _check("outside", outside, count, (height, width))


def _check(name: str, given: Sequence[Tensor], count: int, shape: tuple[int, ...]) -> None:
    shapes = [tuple(each.shape) for each in given]
    if shapes != [shape] * count:
        raise ValueError(
            f"{name}: got the shapes {shapes}; {count} of {shape} belong with the first operand: "
            "call once for all matrices of a shape and rank"
        )
