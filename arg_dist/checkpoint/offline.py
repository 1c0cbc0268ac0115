"""Find, verify and assemble checkpoints without an optimizer or a process group."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from arg_dist.checkpoint.index import CheckpointError, Index, tensor_key
from arg_dist.checkpoint.reading import verified_index
from arg_dist.checkpoint.rotation import checkpoints_in
from arg_dist.checkpoint.slices import SliceReader
from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.entry import plain_mode


def checkpoints_at(path: Path) -> list[Path]:
    """Lists the checkpoints in a folder, newest last; else `path`, as a checkpoint's own folder."""
    found = checkpoints_in(path) if path.is_dir() else []
    return found or [path]


@plain_mode()
def verified_alone(checkpoint: Path) -> Index:
    """Verifies all files of a checkpoint and returns its index.

    Raises:
        CheckpointError: a file is missing or damaged; the message names it.
    """
    return verified_index(checkpoint, Communicator(None))


def newest_intact(path: Path) -> tuple[Path, Index, list[str]]:
    """Finds the newest intact checkpoint in a folder, which may be a checkpoint itself.

    Returns:
        Its folder, its index, and one line for each newer checkpoint that is not intact.

    Raises:
        CheckpointError: no intact checkpoint was found.
    """
    passed_over: list[str] = []
    for checkpoint in reversed(checkpoints_at(path)):
        try:
            return checkpoint, verified_alone(checkpoint), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    if len(passed_over) == 1:
        raise CheckpointError(passed_over[0])
    raise CheckpointError(f"{path}: none of its checkpoints is intact: " + "; ".join(passed_over))


@plain_mode()
def whole_weight(reader: SliceReader, name: str) -> Tensor:
    """Reads a parameter or buffer in the model's shape and its stored type, on the CPU.

    Raises:
        CheckpointError: a slice is missing, or not where the index places it.
    """
    weight = reader.index.weights[name]
    everything = ((0, math.prod(weight.shape)),)
    key = tensor_key("weight", name)
    values = reader.elements(weight, weight.elements, key, everything, transposed=False)
    return values.view(weight.shape)
