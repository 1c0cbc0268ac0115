"""Squares and products of a steady step: Triton kernels, launched once for a list of matrices.

Imported where :func:`arg_dist.subspace.products.available` holds; arguments and results are those
of :mod:`arg_dist.subspace.products`, with which the tests compare it. The matrices of a list have
one shape. A launch takes all that have the same types, strides and alignment, which is one launch
for a list of parameters of one kind. Their addresses travel as a table, one copy to the device.

Elements that a kernel loads and stores for an ``m x n`` matrix of rank r, where a program has b
rows and c columns, 128 or 64 each (:func:`_block`):

======= ========================================== ================ ==============================
kernel  loads                                      stores           of memory, bytes per parameter
======= ========================================== ================ ==============================
squares G: ``m n``                                 squares: ``m``   ``g``
project G: ``ceil(r / 128) m n``                   P: ``m r``       ``g + 4 r / n + 4 r / m``
        Q: ``ceil(m / b) n r``                     squares: ``m``
apply   W, E: ``m n`` each                         W: ``m n``       ``2 w + e + 4 r / n + 4 r / m``
        N: ``ceil(n / c) m r``, factors: as many
        times ``m``; Q: ``ceil(m / b) n r``
======= ========================================== ================ ==============================

The last column has each operand once, in elements of g, w and e bytes: N and Q are small, and the
programs that load the same block of G are neighbours in the order of the launch, so that the cache
serves what is loaded again. For a square matrix with r = n / 8, `project` moves 3 bytes per
parameter where G is in bf16 and 5 in fp32, `apply` with E and factors 7 where all is in bf16 and 13
in fp32. The operations of the plain path, counted in the same way, move 13 and 9, 55 and 21. A test
counts loads and stores; no GPU has run the kernels yet.

A program's block follows from the number of matrices in the list, too: sums are formed in another
order in lists of other lengths.

Sizes, ranks and strides that 16 divides are loaded fastest, 16 bytes at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from arg_dist.subspace.products import (
    MatmulPrecision,
    bf16_parts,
    check_applied,
    check_projected,
    check_shapes,
    empty_products,
)

PROGRAMS = 132
"""Programs that an H100 or H200 runs at once: as many as it has multiprocessors."""
ALIGNMENT = 16
"""Divides addresses, and sizes and strides, where a thread loads 16 bytes at once."""
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
PRODUCTS: dict[MatmulPrecision, str] = {"highest": "tf32x3", "high": "tf32", "medium": "tf32"}
"""How factors in fp32 are multiplied. In tf32x3, each is the sum of two TF32 numbers, of which
three products are formed: the error is fp32's, in tensor cores."""


# -- kernels --------------------------------------------------------------------------------------


@triton.jit
def operand(
    table: tl.tensor,
    at: tl.tensor,
    OPERAND: tl.constexpr,
    TYPE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
) -> tl.tensor:
    """The pointer in a table's row, which begins at `at`."""
    pointer = tl.load(table + at + OPERAND).to(tl.pointer_type(TYPE))
    if IS_ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


INTERPRETED = tl.constexpr(not isinstance(operand, triton.JITFunction))
"""Whether Triton's interpreter runs the kernels, on a CPU. It multiplies no bf16, and truncates
where a GPU rounds."""


@triton.jit
def to_bf16(x: tl.tensor) -> tl.tensor:
    """Rounded to the nearest, of two to the even one."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def to_tf32(x: tl.tensor) -> tl.tensor:
    """Rounded to the nearest, of two to the larger one; tensor cores truncate what is not.

    A factor that has passed through registers also travels to shared memory 16 bytes at a time,
    whatever the order there, and not number by number.
    """
    bits = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def add_fp32_product(
    left: tl.tensor, right: tl.tensor, total: tl.tensor, PRODUCT: tl.constexpr
) -> tl.tensor:
    """``total + left right``, both factors in fp32."""
    if PRODUCT == "tf32":
        left, right = to_tf32(left), to_tf32(right)
    return tl.dot(left, right, total, input_precision=PRODUCT)


@triton.jit
def add_bf16_product(left: tl.tensor, right: tl.tensor, total: tl.tensor) -> tl.tensor:
    """``total + left right``, both factors in bf16."""
    if INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total)
    else:
        return tl.dot(left, right, total)


@triton.jit
def squares_kernel(
    table: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    g_row: tl.tensor,
    g_column: tl.tensor,
    G_TYPE: tl.constexpr,
    G_ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """The squares of ``BLOCK_ROWS`` of one G, in fp64: fp32 has none of the smallest numbers."""
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    program = tl.program_id(0)
    first_row = program % row_blocks * BLOCK_ROWS
    at = program // row_blocks * 2
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    along = tl.arange(0, BLOCK_COLUMNS)[None, :]
    G = operand(table, at, 0, G_TYPE, G_ALIGNED) + first_row.to(tl.int64) * g_row
    offsets = row * g_row + along * g_column
    has_row = first_row + row < rows
    squares = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float64)
    for first in range(0, columns, BLOCK_COLUMNS):
        g = tl.load(G + offsets, mask=has_row & (first + along < columns), other=0.0)
        wide = g.to(tl.float64)
        squares += wide * wide
        G += BLOCK_COLUMNS * g_column
    S = operand(table, at, 1, tl.float64, False) + first_row
    tl.store(S + row, tl.sum(squares, axis=1, keep_dims=True), mask=has_row)


@triton.jit
def project_kernel(
    table: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    g_row: tl.tensor,
    g_column: tl.tensor,
    q_row: tl.tensor,
    q_column: tl.tensor,
    G_TYPE: tl.constexpr,
    G_ALIGNED: tl.constexpr,
    Q_ALIGNED: tl.constexpr,
    P_ALIGNED: tl.constexpr,
    PRODUCT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
) -> None:
    """``BLOCK_ROWS x BLOCK_RANK`` of one P; and, with its first columns, the rows' squares."""
    rank_blocks = tl.maximum(tl.cdiv(rank, BLOCK_RANK), 1)
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    # programs with the same rows of G follow each other
    program = tl.program_id(0)
    first_direction = program % rank_blocks * BLOCK_RANK
    first_row = program // rank_blocks % row_blocks * BLOCK_ROWS
    at = program // (rank_blocks * row_blocks) * 4
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    direction = tl.arange(0, BLOCK_RANK)[None, :]
    along = tl.arange(0, BLOCK_COLUMNS)
    # the start of the block in 64 bits, offsets inside it in 32
    G = operand(table, at, 0, G_TYPE, G_ALIGNED) + first_row.to(tl.int64) * g_row
    Q = operand(table, at, 1, tl.float32, Q_ALIGNED) + first_direction.to(tl.int64) * q_column
    g_offsets = row * g_row + along[None, :] * g_column
    q_offsets = along[:, None] * q_row + direction * q_column
    has_row = first_row + row < rows
    has_direction = first_direction + direction < rank
    product = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for first in range(0, columns, BLOCK_COLUMNS):
        inside = first + along < columns
        g = tl.load(G + g_offsets, mask=has_row & inside[None, :], other=0.0)
        q = tl.load(Q + q_offsets, mask=inside[:, None] & has_direction, other=0.0)
        # sum_j G_ij^2
        wide = g.to(tl.float32)
        squares += wide * wide
        # P = G Q, where Q = Q_high + Q_low if G is in bf16
        if tl.bfloat16 == G_TYPE:
            high = to_bf16(q)
            product = add_bf16_product(g, high, product)
            if PARTS == 2:
                low = to_bf16(q - high.to(tl.float32))
                product = add_bf16_product(g, low, product)
        else:
            product = add_fp32_product(g, q, product, PRODUCT)
        G += BLOCK_COLUMNS * g_column
        Q += BLOCK_COLUMNS * q_row
    P = operand(table, at, 2, tl.float32, P_ALIGNED) + first_row.to(tl.int64) * rank
    P += first_direction
    tl.store(P + row * rank + direction, product, mask=has_row & has_direction)
    S = operand(table, at, 3, tl.float32, False) + first_row
    totals = tl.sum(squares, axis=1, keep_dims=True)
    tl.store(S + row, totals, mask=has_row & (first_direction == 0))


@triton.jit
def apply_kernel(
    table: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    keep: tl.tensor,
    step: tl.tensor,
    w_row: tl.tensor,
    w_column: tl.tensor,
    n_row: tl.tensor,
    n_column: tl.tensor,
    q_row: tl.tensor,
    q_column: tl.tensor,
    e_row: tl.tensor,
    e_column: tl.tensor,
    W_TYPE: tl.constexpr,
    E_TYPE: tl.constexpr,
    W_ALIGNED: tl.constexpr,
    N_ALIGNED: tl.constexpr,
    Q_ALIGNED: tl.constexpr,
    E_ALIGNED: tl.constexpr,
    HAS_OUTSIDE: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
) -> None:
    """The update of ``BLOCK_ROWS x BLOCK_COLUMNS`` of one W."""
    column_blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    program = tl.program_id(0)
    first_column = program % column_blocks * BLOCK_COLUMNS
    first_row = program // column_blocks % row_blocks * BLOCK_ROWS
    at = program // (column_blocks * row_blocks) * 5
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    along = tl.arange(0, BLOCK_RANK)
    far_row, far_column = first_row.to(tl.int64), first_column.to(tl.int64)
    N = operand(table, at, 1, tl.float32, N_ALIGNED) + far_row * n_row
    Q = operand(table, at, 2, tl.float32, Q_ALIGNED) + far_column * q_row
    n_offsets = row * n_row + along[None, :] * n_column
    q_offsets = along[:, None] * q_column + column * q_row
    has_row = first_row + row < rows
    has_column = first_column + column < columns
    update = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    # U = N Q^T
    for first in range(0, rank, BLOCK_RANK):
        inside = first + along < rank
        n = tl.load(N + n_offsets, mask=has_row & inside[None, :], other=0.0)
        q = tl.load(Q + q_offsets, mask=inside[:, None] & has_column, other=0.0)
        update = add_fp32_product(n, q, update, PRODUCT)
        N += BLOCK_RANK * n_column
        Q += BLOCK_RANK * q_column
    inside = has_row & has_column
    # U <- U + phi E
    if HAS_OUTSIDE:
        E = operand(table, at, 3, E_TYPE, E_ALIGNED) + far_row * e_row + far_column * e_column
        e = tl.load(E + row * e_row + column * e_column, mask=inside, other=0.0).to(tl.float32)
        if HAS_FACTORS:
            phi = operand(table, at, 4, tl.float32, False) + first_row
            e *= tl.load(phi + row, mask=has_row, other=0.0)
        update += e
    # W <- keep W + step U
    W = operand(table, at, 0, W_TYPE, W_ALIGNED) + far_row * w_row + far_column * w_column
    w_offsets = row * w_row + column * w_column
    w = tl.load(W + w_offsets, mask=inside, other=0.0).to(tl.float32)
    w = keep * w + step * update
    if tl.bfloat16 == W_TYPE:
        tl.store(W + w_offsets, to_bf16(w), mask=inside)
    else:
        tl.store(W + w_offsets, w, mask=inside)


# -- launches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """A kernel and what it is called with, by parameter; needs no device before it runs.

    Attributes:
        kernel: the kernel.
        programs: their number.
        table: ``matrices x operands``, addresses.
        numbers: sizes, strides and factors.
        constants: types and block sizes.
        warps: warps of a program.
        stages: blocks in flight.
    """

    kernel: Any
    programs: int
    table: list[list[int]]
    numbers: dict[str, int | float]
    constants: dict[str, Any]
    warps: int
    stages: int


def run(launch: Launch, device: torch.device) -> None:
    """Launch a kernel on the device's current stream; returns before it has finished."""
    if launch.programs == 0:
        return
    table = torch.tensor(launch.table, dtype=torch.int64, device="cpu")
    on_gpu = device.type == "cuda"
    if on_gpu:
        table = table.pin_memory().to(device, non_blocking=True)
    with torch.cuda.device(device) if on_gpu else nullcontext():
        launch.kernel[(launch.programs,)](
            table,
            **launch.numbers,
            **launch.constants,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )


def squares(gradients: Sequence[Tensor]) -> Tensor:
    """``k x m``, fp64: ``||G_i||^2`` for the rows of k gradients of one shape, in fp32 or bf16."""
    count, (rows, columns) = len(gradients), gradients[0].shape
    check_shapes("gradients", gradients, count, (rows, columns))
    totals = torch.empty(count, rows, dtype=torch.float64, device=gradients[0].device)
    for launch in squarings(gradients, list(totals)):
        run(launch, gradients[0].device)
    return totals


def squarings(gradients: Sequence[Tensor], totals: Sequence[Tensor]) -> list[Launch]:
    """The launches that fill `totals`, each ``m``, fp64; one for each kind of matrix."""
    launches = []
    for kind in _kinds(gradients):
        G = gradients[kind[0]]
        rows, columns = G.shape
        # along what is contiguous
        block_rows, block_columns = (16, 128) if G.stride(1) == 1 else (128, 16)
        launches.append(
            Launch(
                squares_kernel,
                len(kind) * triton.cdiv(rows, block_rows),
                _addresses(kind, gradients, totals),
                _numbers(dict(rows=rows, columns=columns), g=G),
                dict(
                    G_TYPE=TYPES[G.dtype],
                    G_ALIGNED=_is_aligned(G),
                    BLOCK_ROWS=block_rows,
                    BLOCK_COLUMNS=block_columns,
                ),
                warps=4,
                stages=3,
            )
        )
    return launches


def project(
    gradients: Sequence[Tensor],
    bases: Sequence[Tensor],
    *,
    precision: MatmulPrecision = "highest",
    parts: int | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """As :func:`arg_dist.subspace.products.plain_project`, of gradients in fp32 or bf16.

    With `exact`, fp32's own units multiply factors in fp32, not tensor cores, at any precision.
    """
    check_projected(gradients, bases)
    products, squares = empty_products(gradients, bases)
    for launch in projections(
        gradients,
        bases,
        list(products),
        list(squares),
        product="ieee" if exact else PRODUCTS[precision],
        parts=bf16_parts(precision, parts),
    ):
        run(launch, gradients[0].device)
    return products, squares


def projections(
    gradients: Sequence[Tensor],
    bases: Sequence[Tensor],
    products: Sequence[Tensor],
    squares: Sequence[Tensor],
    *,
    product: str,
    parts: int,
) -> list[Launch]:
    """The launches that fill `products` and `squares`, contiguous; one for each kind of matrix.

    Args:
        gradients: each ``m x n``, fp32 or bf16.
        bases: each ``n x r``, fp32.
        products: each ``m x r``, fp32.
        squares: each ``m``, fp32.
        product: one of the values of :data:`PRODUCTS`, or ``ieee``; for gradients in fp32.
        parts: numbers in bf16 of which the sum stands for one of Q; for gradients in bf16.
    """
    launches = []
    for kind in _kinds(gradients, bases, products):
        G, Q, P = gradients[kind[0]], bases[kind[0]], products[kind[0]]
        rows, columns, rank = *G.shape, Q.shape[1]
        is_low, is_even = G.dtype == torch.bfloat16, _is_even(G)
        widest = 128 if is_low or (is_even and product != "ieee") else 64
        block_rank = min(max(16, triton.next_power_of_2(rank)), widest)
        beside = len(kind) * max(1, triton.cdiv(rank, block_rank))
        block_rows = 64 if product == "ieee" and not is_low else _block(rows, beside)
        launches.append(
            Launch(
                project_kernel,
                beside * triton.cdiv(rows, block_rows),
                _addresses(kind, gradients, bases, products, squares),
                _numbers(dict(rows=rows, columns=columns, rank=rank), g=G, q=Q),
                dict(
                    G_TYPE=TYPES[G.dtype],
                    G_ALIGNED=_is_aligned(G),
                    Q_ALIGNED=_is_aligned(Q),
                    P_ALIGNED=_is_aligned(P),
                    PRODUCT=product,
                    PARTS=parts,
                    BLOCK_ROWS=block_rows,
                    BLOCK_COLUMNS=64 if is_low and is_even and block_rows == 128 else 32,
                    BLOCK_RANK=block_rank,
                ),
                warps=block_rows // 16,
                stages=3,
            )
        )
    return launches


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
    """As :func:`arg_dist.subspace.products.plain_apply`, of weights in fp32 or bf16.

    `exact` is that of :func:`project`.
    """
    check_applied(weights, directions, bases, rows, outside)
    for launch in applications(
        weights,
        directions,
        bases,
        rows,
        outside,
        keep=keep,
        step=step,
        product="ieee" if exact else PRODUCTS[precision],
    ):
        run(launch, weights[0].device)


def applications(
    weights: Sequence[Tensor],
    directions: Sequence[Tensor],
    bases: Sequence[Tensor],
    rows: Sequence[Tensor] | None,
    outside: Sequence[Tensor] | None,
    *,
    keep: float,
    step: float,
    product: str,
) -> list[Launch]:
    """The launches of :func:`apply`; one for each kind of matrix.

    Args:
        weights: as of :func:`apply`.
        directions: as of :func:`apply`.
        bases: as of :func:`apply`.
        rows: as of :func:`apply`.
        outside: as of :func:`apply`.
        keep: as of :func:`apply`.
        step: as of :func:`apply`.
        product: one of the values of :data:`PRODUCTS`, or ``ieee``.
    """
    # where there is nothing to add, W's address stands for E's, and is not read
    added = weights if outside is None else outside
    factors = directions if rows is None else [each.contiguous() for each in rows]
    launches = []
    for kind in _kinds(weights, directions, bases, added):
        W, N, Q, E = (each[kind[0]] for each in (weights, directions, bases, added))
        height, width, rank = *W.shape, Q.shape[1]
        beside = len(kind) * triton.cdiv(width, 128)
        block_rows = 64 if product == "ieee" else _block(height, beside)
        block_columns = block_rows if _is_even(W) and _is_even(E) else 64
        blocks = triton.cdiv(height, block_rows) * triton.cdiv(width, block_columns)
        launches.append(
            Launch(
                apply_kernel,
                len(kind) * blocks,
                _addresses(kind, weights, directions, bases, added, factors),
                _numbers(
                    dict(rows=height, columns=width, rank=rank, keep=float(keep), step=float(step)),
                    w=W,
                    n=N,
                    q=Q,
                    e=E,
                ),
                dict(
                    W_TYPE=TYPES[W.dtype],
                    E_TYPE=TYPES[E.dtype],
                    W_ALIGNED=_is_aligned(W),
                    N_ALIGNED=_is_aligned(N),
                    Q_ALIGNED=_is_aligned(Q),
                    E_ALIGNED=_is_aligned(E),
                    HAS_OUTSIDE=outside is not None,
                    HAS_FACTORS=rows is not None,
                    PRODUCT=product,
                    BLOCK_ROWS=block_rows,
                    BLOCK_COLUMNS=block_columns,
                    BLOCK_RANK=32 if _is_even(N) and _is_even(Q) else 16,
                ),
                warps=block_rows // 16,
                stages=3,
            )
        )
    return launches


def _block(rows: int, beside: int) -> int:
    """Rows of a program, of which `beside` share each block: 64 where 128 would leave some idle."""
    return 128 if rows > 64 and beside * triton.cdiv(rows, 128) >= PROGRAMS else 64


def _kinds(*operands: Sequence[Tensor]) -> list[list[int]]:
    """Positions in the lists, together where all operands have one type, strides and alignment."""
    kinds: dict[Any, list[int]] = {}
    for position, matrices in enumerate(zip(*operands, strict=True)):
        alike = tuple((each.dtype, each.stride(), _is_aligned(each)) for each in matrices)
        kinds.setdefault(alike, []).append(position)
    return list(kinds.values())


def _is_even(matrix: Tensor) -> bool:
    """Whether all of it can be loaded 16 bytes at a time; what cannot takes more registers."""
    numbers = (*matrix.shape, *(each for each in matrix.stride() if each != 1))
    return _is_aligned(matrix) and all(each % ALIGNMENT == 0 for each in numbers)


def _is_aligned(matrix: Tensor) -> bool:
    return matrix.data_ptr() % ALIGNMENT == 0


def _addresses(kind: Sequence[int], *operands: Sequence[Tensor]) -> list[list[int]]:
    return [[each[position].data_ptr() for each in operands] for position in kind]


def _numbers(sizes: dict[str, int | float], **matrices: Tensor) -> dict[str, int | float]:
    """The sizes, and the strides of matrices under their names."""
    strides = {
        f"{name}_{along}": matrix.stride(dimension)
        for name, matrix in matrices.items()
        for dimension, along in enumerate(("row", "column"))
    }
    return {**sizes, **strides}
