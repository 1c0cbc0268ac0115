"""Checkpoints that any engine, on any number of processes, can go on from.

A checkpoint is a folder: an index in JSON, and one safetensors file for each process that wrote it,
with what that process owned: weights (the fp32 master weights, where the engine keeps them), bases,
moments. Nothing in it is code. It appears under its name when it is complete and on the disk, and
is verified before anything is taken from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from arg_dist.checkpoint.index import CheckpointError
from arg_dist.checkpoint.reading import Restored, restore, verified_index
from arg_dist.checkpoint.series import Checkpoints, SaveTimes
from arg_dist.checkpoint.writing import draft, write
from arg_dist.optimizer import AdaRankGrad
from arg_dist.sharding.job import job_communicator

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Restored",
    "SaveTimes",
    "load",
    "save",
]


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
        directory: its folder, which must not exist, on a file system that all processes share.
        optimizer: the AdaRankGrad itself, without wrappers, once the engine has taken it over.
        model: gives what the optimizer does not train, and the model's configuration.
        scheduler: the learning-rate scheduler, or anything with ``state_dict`` (of plain data) and
            ``load_state_dict``.
        step: optimizer steps of the job so far.
        job: plain data to be given back by :func:`load`, such as where the data has been read to.
        weights: save the weights too, not the optimizer alone.

    Raises:
        CheckpointError: on every process; nothing is left in `directory`.
    """
    prepared = draft(
        optimizer, model=model, scheduler=scheduler, step=step, job=job, weights=weights
    )
    processes = job_communicator(optimizer.process_group, optimizer.bind())
    write(prepared, Path(directory), processes)


def load(
    directory: str | Path,
    optimizer: AdaRankGrad,
    *,
    model: nn.Module | None = None,
    scheduler: Any = None,
    weights: bool = True,
) -> Restored:
    """Brings back what :func:`save` wrote, under any engine and on any number of processes.

    Each process reads the rows that it keeps. Settings of the optimizer (learning rate, energy and
    so on) come from the checkpoint; a warning names those that were others.

    Args:
        directory: the checkpoint's folder.
        optimizer: the AdaRankGrad itself, built for the same model with the same names, once the
            engine has taken it over.
        model: gets back what the optimizer does not train.
        scheduler: gets back its state.
        weights: load the weights too, not the optimizer alone.

    Raises:
        CheckpointError: on every process, before anything is changed: a file is missing or damaged,
            or the checkpoint is one of another model.
    """
    processes = job_communicator(optimizer.process_group, optimizer.bind())
    path = Path(directory)
    index = verified_index(path, processes)
    return restore(path, index, optimizer, model=model, scheduler=scheduler, weights=weights)
