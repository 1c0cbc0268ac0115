"""A checkpoint without an optimizer and processes: found, verified, its weights put together."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from arg_dist.checkpoint.index import CheckpointError, Index, tensor_key
from arg_dist.checkpoint.reading import verified_index
from arg_dist.checkpoint.series import checkpoints_in
from arg_dist.checkpoint.slices import SliceReader
from arg_dist.sharding.communicator import Communicator


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoints in a folder of them, the newest last; else `path`, as one checkpoint's."""
    found = checkpoints_in(path) if path.is_dir() else []
    return found or [path]


def verified_alone(checkpoint: Path) -> Index:
    """The index of a checkpoint whose files are all as they were written.

    Raises:
        CheckpointError: names the file that is not.
    """
    return verified_index(checkpoint, Communicator(None))


def newest_intact(path: Path) -> tuple[Path, Index, list[str]]:
    """The newest checkpoint in a folder that is intact; or `path`, where it is a checkpoint's.

    Returns:
        Its folder, its index, and what is wrong with the newer ones, a line for each.

    Raises:
        CheckpointError: there is none.
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


def whole_weight(reader: SliceReader, name: str) -> Tensor:
    """A parameter or buffer, in the model's shape and as it was stored, on the CPU.

    Raises:
        CheckpointError: a slice is not where the index says, or is missing.
    """
    weight = reader.index.weights[name]
    everything = (0, math.prod(weight.shape))
    key = tensor_key("weight", name)
    values = reader.elements(weight, weight.elements, key, everything, transposed=False)
    return values.view(weight.shape)
