"""Whether the CPU and the GPU train the same matrices alike, whatever the job allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import arg_dist
from arg_dist.subspace.products import matmul_precision
from benchmarks.gpu.sections import Sample, Setting
from benchmarks.measuring.contenders import in_one_line
from benchmarks.measuring.results import Block, Figures, Row
from benchmarks.measuring.shapes import DTYPES
from benchmarks.measuring.turns import shape_in

TITLE = "The same matrices trained by a CPU and by the device"
STEPS, GAP = 6, 3
"""Steps, of which every GAP-th one has a refresh."""
RATE = 1e-2
NOISE = 0.1
RESIDUALS = ("orthogonalized", "matched")


@contextmanager
def deterministic() -> Iterator[None]:
    """As a job that asks torch for deterministic algorithms, which raises where there are none."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


FIRST = "as it is"
MODES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    FIRST: nullcontext,
    "again": nullcontext,
    "deterministic": deterministic,
    "TF32 allowed": lambda: matmul_precision("high"),
}
"""What a job may have set; none may change a bit of what the first one leaves."""


@dataclass(frozen=True)
class Trained:
    """What training leaves.

    Attributes:
        weights: after each step, those of each matrix, in host memory and fp64.
        ranks: after each step, that of each matrix.
    """

    weights: list[list[Tensor]]
    ranks: list[list[int]]


def gradients_of(shape: Sequence[int], step: int) -> Tensor:
    """A gradient of decaying spectrum, with noise: half of all directions, each 0.9 of the last."""
    rows, columns = shape
    kept = min(shape) // 2
    generator = torch.Generator().manual_seed(1000 * step + rows)
    left, right, noise = (
        torch.randn(size, generator=generator)
        for size in ((rows, kept), (kept, columns), (rows, columns))
    )
    return (left * 0.9 ** torch.arange(kept)) @ right + NOISE * noise


def train(
    shapes: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype, residual: str
) -> Trained:
    """Train matrices for a few steps.

    Args:
        shapes: of the matrices; the bound of the last one's rank is odd.
        device: where.
        dtype: type of weights and gradients.
        residual: the optimizer's setting.
    """
    matrices = [
        nn.Parameter(gradients_of(shape, STEPS).mul_(0.02).to(device, dtype)) for shape in shapes
    ]
    bounds = [0.25] * (len(shapes) - 1) + [min(shapes[-1]) // 8 | 1]
    groups = [
        {"params": [(f"{i}.weight", matrix)], "low_rank": True, "max_rank": bound}
        for i, (matrix, bound) in enumerate(zip(matrices, bounds, strict=True))
    ]
    optimizer = arg_dist.AdaRankGrad(
        groups,
        lr=RATE,
        process_group=None,
        min_gap=GAP,
        max_gap=GAP,
        residual=residual,  # type: ignore[arg-type]
    )
    weights, ranks = [[matrix.detach().cpu().double() for matrix in matrices]], []
    for step in range(STEPS):
        for matrix, shape in zip(matrices, shapes, strict=True):
            matrix.grad = gradients_of(shape, step).to(device, dtype)
        optimizer.step()
        weights.append([matrix.detach().cpu().double() for matrix in matrices])
        ranks.append([each["rank"] for each in optimizer.stats()])
    return Trained(weights, ranks)


def measure(setting: Setting) -> Iterator[Sample]:
    """A sample for each type, residual and mode."""
    shapes = setting.sizes.shapes
    for dtype_name, dtype in DTYPES.items():
        for residual in RESIDUALS:
            expected = train(shapes, torch.device("cpu"), dtype, residual)
            first: Trained | None = None
            for mode, context in MODES.items():
                sample: Sample = {"dtype": dtype_name, "residual": residual, "mode": mode}
                try:
                    with context():
                        found = train(shapes, setting.device, dtype, residual)
                except Exception as error:  # such as an operator that is not deterministic
                    yield sample | {"error": in_one_line(error)}
                    continue
                first = first or found
                yield sample | {
                    "error": None,
                    "equals_the_first": _equal(found, first),
                    "matrices": [
                        {
                            "shape": list(shape),
                            "first_step": _apart(found, expected, 1, k),
                            "last_step": _apart(found, expected, STEPS, k),
                            "ranks": [each[k] for each in found.ranks],
                            "ranks_on_cpu": [each[k] for each in expected.ranks],
                        }
                        for k, shape in enumerate(shapes)
                    ],
                }


def _apart(found: Trained, expected: Trained, step: int, k: int) -> float:
    """The largest difference after a step, as a share of the longest way of a weight until then."""
    start, here, there = expected.weights[0][k], expected.weights[step][k], found.weights[step][k]
    return float((there - here).abs().max() / (here - start).abs().max())


def _equal(one: Trained, other: Trained) -> bool:
    """Whether all weights of all steps are bitwise equal."""
    return all(
        torch.equal(a, b)
        for pair in zip(one.weights, other.weights, strict=True)
        for a, b in zip(*pair, strict=True)
    )


def figures(samples: list[Sample]) -> Figures:
    """A block for each type and residual, a row for each mode and matrix."""
    columns = ["", "first step", f"step {STEPS}", "ranks", f"bitwise {FIRST}"]
    blocks, kinds = [], dict.fromkeys((each["dtype"], each["residual"]) for each in samples)
    for dtype, residual in kinds:
        own = [s for s in samples if (s["dtype"], s["residual"]) == (dtype, residual)]
        blocks.append(Block(f"{dtype}, {residual}", [row for s in own for row in _rows(s)]))
    notes = [
        "Largest difference of a weight from the CPU's, as a share of the longest way that a "
        f"weight of the matrix has gone until then. Every {GAP}rd step has a refresh.",
        *(
            f"{s['dtype']}, {s['residual']}, {s['mode']}: {s['error']}."
            for s in samples
            if s["error"]
        ),
    ]
    return Figures(TITLE, columns, blocks, notes)


def _rows(sample: Sample) -> list[Row]:
    if sample["error"]:
        return [[sample["mode"], "failed", "failed", "", ""]]
    same = "yes" if sample["equals_the_first"] else "no"
    return [
        [
            f"{shape_in(matrix)}, {sample['mode']}",
            f"{matrix['first_step']:.1e}",
            f"{matrix['last_step']:.1e}",
            "equal" if matrix["ranks"] == matrix["ranks_on_cpu"] else "other",
            same,
        ]
        for matrix in sample["matrices"]
    ]
