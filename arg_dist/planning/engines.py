"""Memory and traffic of the engine itself, without the optimizer: DeepSpeed 0.19, torch 2.13.

Sent bytes are estimates that assume ring collectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from arg_dist.planning.choices import BUCKET, DTYPES, FP32
from arg_dist.planning.cuts import Layout
from arg_dist.planning.meshes import Mesh
from arg_dist.planning.rows import Counts, box_counts


@dataclass(frozen=True, eq=False)
class Held:
    """Bytes that the engine holds on each process at the time of the optimizer step.

    Attributes:
        weights: weights used in forward and backward.
        masters: the engine's fp32 master weights.
        gradients: all gradients, including the engine's fp32 copies.
        buffers: buffers allocated for the whole run, empty or full.
        trained: elements that the optimizer receives, with padding.
        trained_bytes: bytes per element the optimizer receives.
    """

    weights: Counts
    masters: Counts
    gradients: Counts
    buffers: Counts
    trained: Counts
    trained_bytes: int


def held(layout: Layout, dtype: str, bucket: int = BUCKET) -> Held:
    """The memory that an engine holds on each process.

    Args:
        layout: the model's layout under the engine.
        dtype: data type of the weights used in forward and backward, one of :data:`DTYPES`.
        bucket: DeepSpeed's `reduce_bucket_size`.
    """
    size, processes = DTYPES[dtype], layout.processes
    elements = sum(parameter.numel for call in layout.calls for parameter in call)

    def uniform(count: int) -> Counts:
        return np.full(processes, count, np.int64)

    nothing = uniform(0)
    if layout.engine in ("zero1", "zero2"):
        part, whole = layout.part, layout.part * processes
        return Held(
            uniform(size * whole),
            uniform(FP32 * part),
            uniform(FP32 * part),  # the flat fp32 copy; the original gradients are freed by then
            nothing,
            uniform(part),
            FP32,
        )
    if layout.engine == "zero3":
        calls = [sum(layout.chunk(p) for p in call) for call in layout.calls]
        part = sum(calls)
        return Held(
            uniform(size * part),
            uniform(FP32 * part),
            uniform(size * part + FP32 * max(calls)),  # fp32 copy of the sub-group being stepped
            uniform(size * bucket),
            uniform(part),
            FP32,
        )
    if layout.mesh is not None:
        parameters = [parameter for call in layout.calls for parameter in call]
        counts: Counts = np.sum([layout.in_memory(each) for each in parameters], 0, dtype=np.int64)
        pieces = [box_counts(piece.boxes) for piece in layout.pieces(parameters)]
        weights = size * counts
        return Held(weights, nothing, weights, nothing, np.sum(pieces, 0), size)
    if layout.engine == "fsdp2":
        part = sum(layout.chunk(parameter) for call in layout.calls for parameter in call)
        local = nothing.copy()
        for call in layout.calls:
            for piece in layout.pieces(call):
                local[piece.owners] += [stop - start for start, stop in piece.ranges]
        return Held(uniform(size * part), nothing, uniform(size * part), nothing, local, size)
    copies = FP32 if layout.engine == "zero0" and dtype != "fp32" else 0
    return Held(
        uniform(size * elements),
        uniform(copies * elements),
        uniform((size + copies) * elements),
        uniform(size * elements) if layout.engine == "ddp" else nothing,
        uniform(elements),
        copies or size,
    )


class Sent(NamedTuple):
    """Bytes that each process sends.

    Attributes:
        total: all of them.
        crossing: those between copies of the model that are sharded themselves.
    """

    total: Counts
    crossing: Counts

    def first(self, processes: int) -> Sent:
        """Those of the first few processes."""
        return Sent(*(counts[:processes] for counts in self))


def engine_sent(layout: Layout, dtype: str, *, averages: bool = True) -> Sent:
    """Weights and gradients that each process sends per step of one micro-batch.

    Args:
        layout: the model's layout under the engine.
        dtype: data type of the weights used in forward and backward, one of :data:`DTYPES`.
        averages: the engine averages the gradients of all copies of the model; else none cross
            (``gradient_sync="sketch"``).
    """
    if layout.mesh is not None:
        return _sent_on(layout, layout.mesh, DTYPES[dtype])
    size = DTYPES[dtype] * sum(parameter.numel for call in layout.calls for parameter in call)
    copies, each = layout.copies, layout.of_a_copy
    once = size * (each - 1) / each  # a reduce-scatter, or an all-gather
    times = {
        "none": 0,
        "ddp": 2 if averages else 0,  # all-reduce of gradients
        "zero0": 2,
        "zero1": 3,  # all-reduce of gradients, all-gather of weights
        "zero2": 3,
        "zero3": 3,  # all-gather of weights in forward and backward, reduce-scatter of gradients
        "fsdp2": 3,
    }
    # all-reduce of what a process has of the gradients, with the same parts of the other copies
    between = 2 * size / each * (copies - 1) / copies if averages else 0
    within = times[layout.engine] * once
    counts = (
        np.full(layout.processes, round(each), np.int64) for each in (within + between, between)
    )
    return Sent(*counts)


def _sent_on(layout: Layout, mesh: Mesh, size: int) -> Sent:
    """The same on a mesh, where FSDP2 shards what tensor parallelism leaves to each process."""
    part = np.zeros(layout.processes, np.int64)
    for call in layout.calls:
        for parameter in call:
            part += layout.in_memory(parameter)
    within = 3 * size * part * (mesh.fsdp - 1)  # as of a copy
    between = 2 * size * part * (mesh.replicate - 1) // mesh.replicate
    return Sent(within + between, between)
