"""AdamW and GaLore under the same engine, to hold the plan against.

GaLore is galore-torch 1.0's AdamW with ``proj_type="std"``, at the rank that AdaRankGrad may reach.
It needs whole matrices, so that it does not run where an engine cuts them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from arg_dist.planning.cuts import REPLICATED
from arg_dist.planning.engines import Held
from arg_dist.planning.requests import FP32
from arg_dist.planning.rows import Counts
from arg_dist.sharding.layout import MatrixView
from arg_dist.telemetry import ADAMW_BYTES_PER_ELEMENT


def adamw_state(holds: Held) -> Counts:
    """Both moments, in the type of the weights that it is given."""
    return ADAMW_BYTES_PER_ELEMENT * holds.trained * holds.trained_bytes // FP32


def adamw_temporaries(holds: Held, largest_call: int) -> Counts:
    """The denominators of all tensors of a call, as its foreach form, the default on GPUs, takes.

    Args:
        holds: what the engine keeps.
        largest_call: elements of a process in its largest call of ``step()``.
    """
    return np.minimum(holds.trained, largest_call) * holds.trained_bytes


def runs_galore(engine: str) -> bool:
    """Whether GaLore runs under an engine."""
    return engine in REPLICATED


def galore_moments(matrix: MatrixView, rank: int, size: int) -> int:
    """Bytes of both moments of a matrix.

    Args:
        matrix: it.
        rank: of its projector.
        size: bytes of an element of the weights.
    """
    return 2 * size * rank * max(matrix.rows, matrix.columns)


def galore_projector(matrix: MatrixView, rank: int, size: int) -> int:
    """Bytes that a matrix's projector keeps alive.

    In fp32 it is a view of all singular vectors of the shorter side, which stay.
    """
    return size * matrix.short * (matrix.short if size == FP32 else rank)


def galore_temporaries(
    matrices: Iterable[MatrixView], tensors: Iterable[int], size: int
) -> tuple[int, int]:
    """Bytes beyond what it keeps: in a step, and in one with new projectors; at least.

    Args:
        matrices: the low-rank ones.
        tensors: elements of each of the others.
        size: bytes of an element of the weights.
    """
    step = max((2 * size * numel for numel in tensors), default=0)  # denominator, direction
    refresh = 0
    for matrix in matrices:
        numel, short = matrix.rows * matrix.columns, matrix.short
        step = max(step, 2 * size * numel)  # projected back, and scaled
        # a copy for LAPACK, the singular vectors of both sides
        refresh = max(refresh, FP32 * (2 * numel + short * short))
    return step, max(step, refresh)
