"""AdamW and GaLore under the same engine, for comparison.

GaLore is galore-torch 1.0's AdamW with ``proj_type="std"``, at AdaRankGrad's maximum rank. It needs
whole matrices, so it does not run under engines that shard them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from arg_dist.planning.choices import FP32
from arg_dist.planning.cuts import REPLICATED
from arg_dist.planning.engines import Held
from arg_dist.planning.rows import Counts
from arg_dist.sharding.layout import MatrixView
from arg_dist.telemetry import ADAMW_BYTES_PER_ELEMENT


def adamw_state(holds: Held) -> Counts:
    """Bytes of both moments, in the data type of the weights that AdamW receives."""
    return ADAMW_BYTES_PER_ELEMENT * holds.trained * holds.trained_bytes // FP32


def adamw_temporaries(holds: Held, largest_call: int) -> Counts:
    """Bytes of the denominators of all tensors in a call: foreach AdamW, the default on GPUs.

    Args:
        holds: what the engine holds.
        largest_call: elements per process in the largest call to ``step()``.
    """
    return np.minimum(holds.trained, largest_call) * holds.trained_bytes


def runs_galore(engine: str) -> bool:
    """Whether GaLore runs under `engine`."""
    return engine in REPLICATED


def galore_moments(matrix: MatrixView, rank: int, size: int) -> int:
    """Bytes of both moments of a matrix.

    Args:
        matrix: the matrix.
        rank: rank of its projector.
        size: bytes per element of the weights.
    """
    return 2 * size * rank * max(matrix.rows, matrix.columns)


def galore_projector(matrix: MatrixView, rank: int, size: int) -> int:
    """Bytes that a matrix's projector keeps alive.

    In fp32 the projector is a view of all singular vectors of the shorter side, so all of them stay
    in memory.
    """
    return size * matrix.short * (matrix.short if size == FP32 else rank)


def galore_temporaries(
    matrices: Iterable[MatrixView], tensors: Iterable[int], size: int
) -> tuple[int, int]:
    """Lower bounds of the temporaries in bytes: of a step, and of one that updates projectors.

    Args:
        matrices: the low-rank matrices.
        tensors: number of elements of each other tensor.
        size: bytes per element of the weights.
    """
    step = max((2 * size * numel for numel in tensors), default=0)  # denominator, direction
    refresh = 0
    for matrix in matrices:
        numel, short = matrix.rows * matrix.columns, matrix.short
        step = max(step, 2 * size * numel)  # projected back, and scaled
        # a copy for LAPACK, and the singular vectors of both sides
        refresh = max(refresh, FP32 * (2 * numel + short * short))
    return step, max(step, refresh)
