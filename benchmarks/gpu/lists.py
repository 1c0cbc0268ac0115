"""The kernels for lists of matrices against PyTorch, matrix by matrix."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from arg_dist.subspace.products import (
    available,
    matmul_precision,
    plain_apply,
    plain_project,
)
from benchmarks.gpu.clock import timed_on
from benchmarks.gpu.sections import Sample, Setting
from benchmarks.measuring.contenders import in_one_line
from benchmarks.measuring.results import NOT_POSSIBLE, Block, Figures, Row, number
from benchmarks.measuring.shapes import DTYPES, Place, Shape, layer_shapes
from benchmarks.measuring.timing import Times, in_turns
from benchmarks.measuring.turns import shape_in

TITLE = "Products of a steady step, for lists of matrices"
PLAIN, GROUPED = "plain", "grouped"
KEEP, STEP = 1.0, -1.0
FP32 = 4
"""Bytes of an element of bases, directions and factors."""


class Way(NamedTuple):
    """How the products are computed: as :mod:`arg_dist.subspace.products` describes them."""

    project: Callable[..., tuple[Tensor, Tensor | None]]
    apply: Callable[..., None]


IN_PYTORCH = Way(plain_project, plain_apply)


class Operands:
    """Matrices of one shape, oriented as ``moment x basis``, and what a step has for them.

    Args:
        shape: of the matrices.
        count: how many.
        rank: of the bases.
        place: device, and type of weights and gradients.

    Attributes:
        gradients: each ``m x n``.
        weights: each ``m x n``.
        bases: each ``n x r``, fp32.
        directions: each ``m x r``, fp32.
        factors: each ``m``, fp32.
    """

    def __init__(self, shape: Shape, count: int, rank: int, place: Place) -> None:
        self.m, self.n = max(shape.rows, shape.columns), min(shape.rows, shape.columns)
        self.count, self.rank, self.element_size = count, rank, place.dtype.itemsize

        def filled(*size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
            return [torch.randn(size, device=place.device).to(dtype) for _ in range(count)]

        def oriented() -> list[Tensor]:
            stored = filled(shape.rows, shape.columns, dtype=place.dtype)
            return stored if shape.rows >= shape.columns else [each.T for each in stored]

        self.gradients, self.weights = oriented(), oriented()
        self.bases = filled(self.n, rank)
        self.directions = filled(self.m, rank)
        self.factors = filled(self.m)

    def project(self, by: Way) -> list[Tensor]:
        """``P = G Q``, and the norms of the rows."""
        products, squares = by.project(self.gradients, self.bases)
        assert squares is not None
        return [*products, *squares]

    def apply(self, by: Way) -> list[Tensor]:
        """``W <- keep W + step (N Q^T + phi G)``, as with matched residuals."""
        given = self.weights, self.directions, self.bases, self.factors, self.gradients
        by.apply(*given, keep=KEEP, step=STEP)
        return self.weights

    def applied(self, by: Way) -> list[Tensor]:
        """What :meth:`apply` changes; the weights are as before."""
        before = [weight.clone() for weight in self.weights]
        pairs = list(zip(self.apply(by), before, strict=True))
        changes = [weight.float() - old.float() for weight, old in pairs]
        for weight, old in pairs:
            weight.copy_(old)
        return changes

    def moved(self, product: str) -> int:
        """Bytes that a product reads and writes, each operand once."""
        m, n, r, size = self.m, self.n, self.rank, self.element_size
        small = FP32 * (n * r + m * r + m)
        return self.count * (small + (1 if product == "project" else 3) * size * m * n)

    @property
    def operations(self) -> int:
        """Those of a product."""
        return 2 * self.count * self.m * self.n * self.rank


def measure(setting: Setting) -> Iterator[Sample]:
    """A sample for each product, shape, type, rank and number of matrices."""
    paths, reason = ways(setting.device)
    timed = timed_on(setting.device)
    for shape, count, rank in cases(setting):
        for dtype_name, dtype in DTYPES.items():
            operands = Operands(shape, count, rank, Place(setting.device, dtype))
            for product in ("project", "apply"):
                run: Callable[[Way], list[Tensor]] = getattr(operands, product)
                with matmul_precision("highest"):  # as in a step
                    found = difference(operands, product, paths)
                    working = {
                        name: partial(run, path)
                        for name, path in paths.items()
                        if name == PLAIN or not isinstance(found, str)
                    }
                    times = in_turns(working, setting.sizes.rounds, timed)
                yield {
                    "product": product,
                    "shape": [shape.rows, shape.columns],
                    "count": count,
                    "rank": rank,
                    "dtype": dtype_name,
                    "bytes": operands.moved(product),
                    "operations": operands.operations,
                    "seconds": {name: taken.as_json() for name, taken in times.items()},
                    "difference": found if isinstance(found, float) else None,
                    "not_possible": found if isinstance(found, str) else reason,
                }


def ways(device: torch.device) -> tuple[dict[str, Way], str | None]:
    """What computes the products on a device, and why the kernels are not among it."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        works = available(device)
    if not works:
        reason = "; ".join(str(each.message) for each in told)
        return {PLAIN: IN_PYTORCH}, reason or f"no Triton that runs on {device}"
    from arg_dist.subspace import grouped_kernels

    kernels = Way(grouped_kernels.project, grouped_kernels.apply)
    return {PLAIN: IN_PYTORCH, GROUPED: kernels}, None


def cases(setting: Setting) -> Iterator[tuple[Shape, int, int]]:
    """Shapes with numbers of matrices and ranks: all of them for the first shape.

    Each further shape costs the compilation of its kernels.
    """
    sizes = setting.sizes
    first, *others = layer_shapes(sizes.model)
    for shape in (first, *others):
        yield shape, sizes.lists[0], sizes.ranks[0]
    for count in sizes.lists:
        for rank in sizes.ranks:
            if (count, rank) != (sizes.lists[0], sizes.ranks[0]):
                yield first, count, rank


def difference(operands: Operands, product: str, paths: dict[str, Way]) -> float | str | None:
    """How far the two paths lie apart.

    Returns:
        The norm of the difference as a share of the plain result's, where it is largest; the error
        of the grouped path; or None, if there is but one path.
    """
    if GROUPED not in paths:
        return None
    run = operands.project if product == "project" else operands.applied
    expected = run(IN_PYTORCH)
    try:
        found = run(paths[GROUPED])
        return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
    except Exception as error:  # of a compiler, a driver, a kernel
        return in_one_line(error)


def figures(samples: list[Sample]) -> Figures:
    """A block for each product, shape and type, a row for each list and rank."""
    columns = ["", "plain, ms", "GB/s", "grouped, ms", "GB/s", "TFLOP/s", "plain/grouped", "apart"]
    blocks: dict[str, list[Row]] = {}
    for sample in samples:
        heading = f"{sample['product']}, {shape_in(sample)}, {sample['dtype']}"
        blocks.setdefault(heading, []).append(_row(sample))
    reasons = dict.fromkeys(s["not_possible"] for s in samples if s["not_possible"])
    notes = [
        "Medians, by the device's clock. GB/s counts each operand once, TFLOP/s two operations "
        "for each term of a product. apply is that of matched residuals. Apart: norm of the "
        "difference of the results, as a share of the plain one's, where it is largest.",
        *(f"{GROUPED}, {NOT_POSSIBLE}: {reason}." for reason in reasons),
    ]
    return Figures(TITLE, columns, [Block(*each) for each in blocks.items()], notes)


def _row(sample: Sample) -> Row:
    times = {name: Times.from_json(taken) for name, taken in sample["seconds"].items()}
    label = f"{sample['count']} of rank {sample['rank']}"

    def timed(name: str) -> Row:
        if name not in times:
            return [NOT_POSSIBLE, ""]
        seconds = times[name].median
        return [f"{1e3 * seconds:.3f}", number(sample["bytes"] / seconds / 1e9)]

    if GROUPED not in times:
        return [label, *timed(PLAIN), *timed(GROUPED), "", "", ""]
    return [
        label,
        *timed(PLAIN),
        *timed(GROUPED),
        number(sample["operations"] / times[GROUPED].median / 1e12),
        number(times[PLAIN].over(times[GROUPED]).median),
        f"{sample['difference']:.1e}",
    ]
