"""Meshes of tensor parallelism under FSDP2, and the box of every parameter on each process."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from arg_dist.config import ConfigError
from arg_dist.planning.model import Model
from arg_dist.sharding.blocks import Boxes
from arg_dist.sharding.layout import Ranges
from arg_dist.subspace.distributed import Interval

AXES = ("replicate", "fsdp", "tp")
CUT_FROM_END = {
    "colwise": 2, "colwise_gather_output": 2, "colwise_rep": 2, "embedding_rowwise": 2,
    "rowwise": 1, "rowwise_split_input": 1, "rowwise_rep": 1, "embedding_colwise": 1,
}  # fmt: skip
"""Which dimension of a weight a style of transformers' tensor-parallel plans cuts: from the end."""


@dataclass(frozen=True)
class Mesh:
    """Processes by their coordinates, the last of which counts fastest.

    Attributes:
        replicate: copies of the model, whose gradients the engine averages (HSDP).
        fsdp: processes over which FSDP2 shards.
        tp: processes of tensor parallelism.
    """

    replicate: int = 1
    fsdp: int = 1
    tp: int = 1

    @property
    def processes(self) -> int:
        """Number of processes."""
        return self.replicate * self.fsdp * self.tp

    @property
    def text(self) -> str:
        """As it is given on the command line."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        return ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1 or axis == "fsdp")


def parse_mesh(text: str) -> Mesh:
    """The mesh that a text such as ``fsdp=8,tp=8`` names.

    Raises:
        ConfigError: it names none.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (each.strip() for each in part.partition("="))
        if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise ConfigError(
                f"--mesh {text}: got {part!r}; give sizes of at least 1 of the axes "
                f"{', '.join(AXES)}, each once, such as fsdp=8,tp=8"
            )
        sizes[axis] = int(size)
    return Mesh(**sizes)


def cut_dimensions(model: Model) -> dict[str, int | None]:
    """The dimension of each parameter that tensor parallelism cuts; None if it is left whole.

    Raises:
        ConfigError: the model has no plan, or one that gives processes several separate pieces.
    """
    if not model.tp_plan:
        raise ConfigError(
            f"--mesh: --model {model.name} has no tensor-parallel plan (base_model_tp_plan of its "
            "configuration in transformers); leave tp out of the mesh"
        )
    return {
        parameter.name: _cut_dimension(parameter.name, len(parameter.shape), model.tp_plan)
        for parameter in model.parameters
    }


def _cut_dimension(name: str, dimensions: int, plan: Mapping[str, str]) -> int | None:
    module, _, own_name = name.rpartition(".")
    pattern, module_pattern = (re.sub(r"\.\d+(?=\.|$)", ".*", each) for each in (name, module))
    style = plan.get(pattern) or plan.get(module_pattern) or ""
    if style.startswith("packed"):
        raise ConfigError(
            f"--mesh: the tensor-parallel plan cuts {name} in separate pieces ({style}), which "
            "arg_dist does not support; leave tp out of the mesh"
        )
    from_end = CUT_FROM_END.get(style)
    if from_end is None or (from_end == 1 and own_name == "bias"):
        return None
    return max(0, dimensions - from_end)


@lru_cache(maxsize=4096)
def boxes_on(mesh: Mesh, shape: tuple[int, ...], cut: int | None) -> Boxes:
    """What each process holds of a parameter, in each dimension.

    FSDP2 shards the first dimension, of what tensor parallelism leaves a process.

    Args:
        mesh: the processes.
        shape: shape of the parameter.
        cut: the dimension that tensor parallelism cuts, if any.
    """
    shape = shape or (1,)
    dimensions: list[list[Interval]] = [[] for _ in shape]
    for process in range(mesh.processes):
        fsdp, tp = process // mesh.tp % mesh.fsdp, process % mesh.tp
        for k, size in enumerate(shape):
            start, stop = 0, size
            if k == cut:
                start, stop = chunk(start, stop, mesh.tp)[tp]
            if k == 0:
                start, stop = chunk(start, stop, mesh.fsdp)[fsdp]
            dimensions[k].append((start, stop))
    return tuple(map(tuple, dimensions))


@lru_cache(maxsize=4096)
def chunk(start: int, stop: int, parts: int) -> Ranges:
    """An interval in parts as ``torch.chunk`` cuts it: the last ones are shorter, or empty."""
    length = -(-(stop - start) // parts)
    bounds = [min(start + i * length, stop) for i in range(parts + 1)]
    return tuple(pairwise(bounds))


def held_with_padding(mesh: Mesh, shape: tuple[int, ...], cut: int | None) -> list[int]:
    """Elements that each process has in memory, as FSDP2 makes all parts of a dimension equal."""
    shape, counts = shape or (1,), []
    for process in range(mesh.processes):
        local = list(shape)
        if cut is not None:
            low, high = chunk(0, shape[cut], mesh.tp)[process % mesh.tp]
            local[cut] = high - low
        local[0] = -(-local[0] // mesh.fsdp)
        counts.append(math.prod(local))
    return counts
