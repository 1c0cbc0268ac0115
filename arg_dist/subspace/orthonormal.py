"""Orthonormal columns that span those of a sketch, whatever its rank.

Householder reflections are a sequence of small steps, in which a GPU idles; a CPU takes two to five
times as long for anything else (``benchmarks/results/2026-11-29-signs-and-cholesky.md``). A GPU
makes the columns orthonormal by products of matrices, and no value is read: shifted CholeskyQR3
(Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa 2020).
"""

from __future__ import annotations

import torch
from torch import Tensor

from arg_dist.subspace.norms import in_host_memory
from arg_dist.subspace.sketch import uniform

FILL = 1e-9
"""Size of what is added to a sketch relative to its own, a hundredth of its rounding in fp32."""
PASSES = 3


def orthonormalize(sketch: Tensor) -> Tensor:
    """Orthonormal columns that span those of `sketch`, ``rows x width`` (rows >= width, or none).

    If the sketch is rank-deficient, the columns span others beside its own.
    """
    if not sketch.shape[0]:
        return sketch
    return torch.linalg.qr(sketch).Q if in_host_memory(sketch) else cholesky_qr(sketch)


def cholesky_qr(sketch: Tensor) -> Tensor:
    """:func:`orthonormalize` by products and factorizations of ``width x width``, in fp64."""
    rows, width = sketch.shape
    vectors = sketch.double()
    # Y <- Y + H: no combination of columns is zero any more, as H has full rank; H is a Hankel
    # matrix of random numbers, a view of as many as it has diagonals
    size = torch.linalg.vector_norm(vectors)
    size = torch.where(size > 0, size, 1.0) * (FILL / (rows * width / 3) ** 0.5)
    numbers = uniform("orthonormal", rows + width - 1, sketch.device)
    vectors += (numbers * size).unfold(0, width, 1)
    for number in range(PASSES):
        # R^T R = Y^T Y + s I ;  Y <- Y R^-1, s only at first: rounding must not make it indefinite
        gram = vectors.T @ vectors
        if not number:
            shift = gram.diagonal().sum() * ((rows + width) * torch.finfo(torch.float64).eps)
            gram.diagonal().add_(shift)
        factor = torch.linalg.cholesky_ex(gram, upper=True).L  # without _ex, it waits for the GPU
        vectors = torch.linalg.solve_triangular(factor, vectors, upper=True, left=False)
    return vectors.to(sketch.dtype)
