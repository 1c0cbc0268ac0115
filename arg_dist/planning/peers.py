"""Other optimizers under the same engine, for comparison.

Each holds what its code allocates: torch's AdamW; torchao's AdamW8bit, whose blocks and thresholds
are those of bitsandbytes; torch's Muon with AdamW for the rest, each process with the momentum of
its own part, as Dion's and DeepSpeed's keep it; galore-torch 1.0's AdamW with ``proj_type="std"``,
at AdaRankGrad's maximum rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from arg_dist.config import AdaRankGradConfig
from arg_dist.planning.choices import AGAINST, DTYPES, FP32
from arg_dist.planning.cuts import REPLICATED, Layout
from arg_dist.planning.engines import Held
from arg_dist.planning.model import Parameter
from arg_dist.planning.rows import Counts, box_counts
from arg_dist.telemetry import ADAMW_BYTES_PER_ELEMENT

BF16 = DTYPES["bf16"]
BLOCK = 256
"""Elements of torchao's AdamW8bit that share a scale."""
QUANTIZED = 4096
"""Elements from which it quantizes a tensor."""


@dataclass(frozen=True, eq=False)
class Memory:
    """Bytes of an optimizer on each process.

    Attributes:
        moments: moments, or momenta, of the low-rank matrices, if they are kept apart.
        projectors: what projects them.
        full_rank: moments of all else.
        step: temporaries of a step.
        refresh: those of one that updates projectors.
    """

    moments: Counts
    projectors: Counts
    full_rank: Counts
    step: Counts
    refresh: Counts


@dataclass(frozen=True)
class Peer:
    """An optimizer to compare with.

    Attributes:
        title: what tables call it.
        memory: what it holds, given the layout, what the engine holds, and our settings.
        shards: whether it runs where no process has whole gradients.
        note: what its figures leave out; "" for nothing.
    """

    title: str
    memory: Callable[[Layout, Held, AdaRankGradConfig], Memory]
    shards: bool = True
    note: str = ""

    def runs_under(self, engine: str) -> bool:
        """Whether it runs under an engine."""
        return self.shards or engine in REPLICATED


def _parts(layout: Layout) -> Iterator[tuple[Parameter, Counts]]:
    """Every parameter, with the number of its elements that each process steps."""
    for call in layout.calls:
        for piece in layout.pieces(call):
            counts = np.zeros(layout.processes, np.int64)
            counts[piece.owners] = (
                box_counts(piece.boxes)
                if piece.boxes
                else [stop - start for start, stop in piece.ranges]
            )
            yield piece.parameter, counts


def _largest_call(layout: Layout, holds: Held) -> int:
    """Elements of a process in the largest call to ``step()``."""
    if layout.replicated:
        return int(holds.trained.max())
    if layout.engine in ("zero1", "zero2"):
        return layout.part
    return max(sum(layout.chunk(parameter) for parameter in call) for call in layout.calls)


def _adamw(layout: Layout, holds: Held, settings: AdaRankGradConfig) -> Memory:
    """Both moments in the type of the weights; foreach, the default on GPUs, has denominators."""
    nothing, size = np.zeros(layout.processes, np.int64), holds.trained_bytes
    moments = ADAMW_BYTES_PER_ELEMENT * holds.trained * size // FP32
    passing = np.minimum(holds.trained, _largest_call(layout, holds)) * size
    return Memory(nothing, nothing, moments, passing, passing)


def _adamw_8bit(layout: Layout, holds: Held, settings: AdaRankGradConfig) -> Memory:
    """A byte for each number, a scale for each block, and a table of all codes for each tensor."""
    nothing = np.zeros(layout.processes, np.int64)
    moments = nothing.copy()
    for _, counts in _parts(layout):
        few = (counts >= QUANTIZED) & (counts % BLOCK == 0)
        coded = counts + FP32 * (counts // BLOCK + 256)
        moments += 2 * np.where(few, coded, holds.trained_bytes * counts)
    return Memory(nothing, nothing, moments, nothing, nothing)


def _muon(layout: Layout, holds: Held, settings: AdaRankGradConfig) -> Memory:
    """The momentum of matrices, both moments of all else; whole matrices one at a time."""
    size = holds.trained_bytes
    momentum, rest = (np.zeros(layout.processes, np.int64) for _ in range(2))
    step = 0
    for parameter, counts in _parts(layout):
        if not parameter.views:
            rest += counts
            continue
        momentum += counts
        for view in parameter.views:
            numel = view.rows * view.columns
            # what is made orthogonal, two of Newton-Schulz's iterates, and two of its squares
            step = max(step, (size + 2 * BF16) * numel + 2 * BF16 * view.short**2)
    passing = np.maximum(step, size * rest)
    return Memory(size * momentum, np.zeros_like(rest), 2 * size * rest, passing, passing)


def _galore(layout: Layout, holds: Held, settings: AdaRankGradConfig) -> Memory:
    """Moments of projected gradients, and what the projectors keep alive.

    In fp32 a projector is a view of all singular vectors of the shorter side, so all of them stay
    in memory.
    """
    nothing, size = np.zeros(layout.processes, np.int64), holds.trained_bytes
    parameters = [parameter for call in layout.calls for parameter in call]
    rest = [parameter.numel for parameter in parameters if not parameter.views]
    step = max((2 * size * numel for numel in rest), default=0)  # denominator, direction
    moments = projectors = refresh = 0
    for view in (view for parameter in parameters for view in parameter.views):
        _, rank = settings.rank_bounds(view.short)
        numel, short = view.rows * view.columns, view.short
        moments += 2 * size * rank * max(view.rows, view.columns)
        projectors += size * short * (short if size == FP32 else rank)
        step = max(step, 2 * size * numel)  # projected back, and scaled
        # a copy for LAPACK, and the singular vectors of both sides
        refresh = max(refresh, FP32 * (2 * numel + short * short))
    return Memory(
        nothing + moments,
        nothing + projectors,
        nothing + 2 * size * sum(rest),
        nothing + step,
        nothing + max(step, refresh),
    )


PEERS = {
    "adamw": Peer(AGAINST["adamw"], _adamw),
    "adamw-8bit": Peer(AGAINST["adamw-8bit"], _adamw_8bit, note="temporaries are left out"),
    "muon": Peer(AGAINST["muon"], _muon, note="one whole matrix at a time"),
    "galore": Peer(AGAINST["galore"], _galore, shards=False, note="temporaries are lower bounds"),
}
"""By the names of ``--against``."""
