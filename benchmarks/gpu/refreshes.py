"""The parts of a refresh of one matrix, each as the device and as the host can do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from arg_dist.subspace.orthonormal import cholesky_qr
from arg_dist.subspace.products import matmul_precision
from arg_dist.subspace.sketch import random_signs
from benchmarks.gpu.clock import timed_on
from benchmarks.gpu.sections import Sample, Setting
from benchmarks.measuring.results import Block, Figures, with_spread
from benchmarks.measuring.shapes import layer_shapes
from benchmarks.measuring.timing import Times, in_turns
from benchmarks.measuring.turns import shape_in

TITLE = "Parts of a refresh"
Part = Callable[[], object]


def measure(setting: Setting) -> Iterator[Sample]:
    """A sample for each shape and width of the sketch."""
    timed = timed_on(setting.device)
    for width in setting.sizes.widths:
        for shape in layer_shapes(setting.sizes.model):
            long, short = max(shape.rows, shape.columns), min(shape.rows, shape.columns)
            asked, waited = parts(long, short, width, setting.device)
            with torch.no_grad(), matmul_precision("highest"):
                times = in_turns(asked, setting.sizes.rounds, timed)
                times |= in_turns(waited, setting.sizes.rounds)
            yield {
                "shape": [shape.rows, shape.columns],
                "width": width,
                "seconds": {name: taken.as_json() for name, taken in times.items()},
            }


def parts(
    long: int, short: int, width: int, device: torch.device
) -> tuple[dict[str, Part], dict[str, Part]]:
    """The parts that only issue work, and those in which the host waits for the device.

    Args:
        long: m, rows of the gradient in its orientation.
        short: n, its columns, of which the basis spans a subspace.
        width: columns of the sketch.
        device: where the gradient is.
    """
    G = torch.randn(long, short, device=device)
    omega = random_signs((0, long), width, seed=0, name="w", refresh=0, device=device)
    Y = G.T @ omega
    Q = torch.linalg.qr(Y).Q
    B = G @ Q
    gram = B.double().T @ B.double()

    def sketch() -> Tensor:
        return random_signs((0, long), width, seed=0, name="w", refresh=0, device=device)

    def gram_matrix() -> Tensor:
        image = B.double()
        return image.T @ image

    def eigh_on_host() -> Tensor:
        return torch.linalg.eigh(gram.cpu()).eigenvectors.to(device)

    asked: dict[str, Part] = {
        "random signs": sketch,
        "G^T Omega": lambda: G.T @ omega,
        "G Q": lambda: G @ Q,
        "Cholesky-QR": lambda: cholesky_qr(Y),
        "Householder QR": lambda: torch.linalg.qr(Y),
        "Gram matrix in fp64": gram_matrix,
        "rotation in fp64": lambda: (Q.double() @ gram).float(),
    }
    waited: dict[str, Part] = {
        "eigh on the device": lambda: torch.linalg.eigh(gram),
        "eigh on the host": eigh_on_host,
    }
    return asked, waited


def figures(samples: list[Sample]) -> Figures:
    """A block for each width, with a column for each shape."""
    shapes = list(dict.fromkeys(map(shape_in, samples)))
    blocks = []
    for width in dict.fromkeys(each["width"] for each in samples):
        own = [each for each in samples if each["width"] == width]
        taken = {shape_in(each): each["seconds"] for each in own}
        rows = [
            [name, *(_cell(taken, shape, name) for shape in shapes)] for name in own[0]["seconds"]
        ]
        blocks.append(Block(f"{width} columns, ms", rows))
    notes = [
        "A refresh with one power pass has each product with G and the orthonormalization twice, "
        "and every other part once, eigh on the host. Medians, with quartiles in parentheses."
    ]
    return Figures(TITLE, ["", *shapes], blocks, notes)


def _cell(taken: dict[str, Sample], shape: str, name: str) -> str:
    if shape not in taken:
        return ""
    return with_spread(Times.from_json(taken[shape][name]).spread.times(1e3))
