"""Checkpoints from which any engine, on any number of processes, can resume.

A checkpoint is a folder with a JSON index and one safetensors file per process that wrote it. The
file contains what that process owned: weights (the fp32 master weights, where the engine keeps
them), bases and moments. A checkpoint contains no code. It appears under its name once it is
complete and synced to disk, and is verified before anything is loaded from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from arg_dist.checkpoint.index import CheckpointError
from arg_dist.checkpoint.reading import Restored, restore, verified_index
from arg_dist.checkpoint.rotation import Checkpoints, SaveTimes
from arg_dist.checkpoint.writing import draft, write
from arg_dist.optimizer import AdaRankGrad
from arg_dist.sharding.entry import entry_point
from arg_dist.sharding.job import job_communicator

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Restored",
    "SaveTimes",
    "load",
    "save",
]


@entry_point
def save(
    directory: str | Path,
    optimizer: AdaRankGrad,
    *,
    model: nn.Module | None = None,
    scheduler: Any = None,
    step: int = 0,
    job: Mapping[str, Any] | None = None,
    weights: bool = True,
) -> None:
    """Writes one checkpoint; every process must call it. For a series, see :class:`Checkpoints`.

    Args:
        directory: folder of the checkpoint, which must not exist yet, on a file system shared by
            all processes.
        optimizer: the AdaRankGrad itself, without wrappers, after the engine has taken it over.
        model: the model, to save its configuration and what the optimizer does not train.
        scheduler: the learning-rate scheduler, or any object with ``state_dict`` (of data; see
            :func:`arg_dist.checkpoint.values.encode`) and ``load_state_dict``.
        step: optimizer steps of the job so far.
        job: data that :func:`load` returns, such as the position in the data; what the first
            process gives. See :func:`arg_dist.checkpoint.values.encode`.
        weights: whether to save the weights in addition to the optimizer's state.

    Raises:
        CheckpointError: on every process; nothing is left in `directory`.
    """
    prepared = draft(
        optimizer, model=model, scheduler=scheduler, step=step, job=job, weights=weights
    )
    processes = job_communicator(optimizer.process_group, optimizer.bind())
    write(prepared, Path(directory), processes)


@entry_point
def load(
    directory: str | Path,
    optimizer: AdaRankGrad,
    *,
    model: nn.Module | None = None,
    scheduler: Any = None,
    weights: bool = True,
) -> Restored:
    """Loads what :func:`save` wrote, under any engine and on any number of processes.

    Each process reads only the rows that it holds. The optimizer's settings (learning rate, energy
    and so on) are restored from the checkpoint; a warning lists those that differ.

    Args:
        directory: folder of the checkpoint.
        optimizer: the AdaRankGrad itself, built for the same model with the same names, after the
            engine has taken it over.
        model: the model, to restore what the optimizer does not train.
        scheduler: the scheduler whose state to restore.
        weights: whether to load the weights in addition to the optimizer's state.

    Raises:
        CheckpointError: on every process, before anything is changed: a file is missing or
            damaged, or the checkpoint belongs to another model.
    """
    processes = job_communicator(optimizer.process_group, optimizer.bind())
    path = Path(directory)
    index = verified_index(path, processes)
    return restore(path, index, optimizer, model=model, scheduler=scheduler, weights=weights)
