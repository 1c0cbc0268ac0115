"""A checkpoint's index: what it holds, and in which rows of which file each part of it lies.

A checkpoint is a folder: ``index.json``, and one safetensors file for each process that wrote it.
The index speaks of matrices, tensors and parameters as the model has them; engines and the number
of processes show only in the slices, which any reader puts together as it needs them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

FORMAT = "arg_dist checkpoint"
SCHEMA_VERSION = 1
INDEX_NAME = "index.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file and what to do."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Slice = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
"""Rows ``[start, stop)`` that a process wrote: process, start, stop."""


class SlicedTensor(_Part):
    """A tensor that the processes wrote in slices of its rows.

    Attributes:
        shape: of the whole.
        dtype: as torch calls it, e.g. ``float32``.
        slices: disjoint, together all rows; in the file of the process they are called
            :func:`tensor_key`.
    """

    shape: tuple[int, ...]
    dtype: str
    slices: list[Slice]


class StateEntry(_Part):
    """Optimizer state of one matrix, or of one tensor that full-rank Adam trains.

    Attributes:
        kind: ``matrix`` or ``tensor``.
        shape: as the model has it.
        transposed: the moments of a tensor are in column-major order.
        side: the side that the basis spans, `right` or `left`; None for a tensor.
        numbers: rank, step, gap and the like; see :mod:`arg_dist.algorithm`.
        lists: lists of such numbers.
        tensors: basis, exp_avg, exp_avg_sq; of a matrix, exp_avg is ``long x rank``.
        kept_sq: ``||P||^2`` of the last step, as a sum over slices of exp_avg: process, first row,
            value.
    """

    kind: Literal["matrix", "tensor"]
    shape: tuple[int, ...]
    transposed: bool
    side: Literal["right", "left"] | None
    numbers: dict[str, int | float]
    lists: dict[str, list[float]] = {}
    tensors: dict[str, SlicedTensor]
    kept_sq: list[tuple[int, int, float]] = []


class Weight(_Part):
    """One parameter or buffer of the model, stored as its elements in a row.

    Attributes:
        shape: as the model has it.
        transposed: the elements are in column-major order.
        elements: ``numel``, in slices.
        kind: ``trained`` by the optimizer (the fp32 master weights, where the engine keeps them),
            ``frozen``, or ``buffer``.
    """

    shape: tuple[int, ...]
    transposed: bool
    elements: SlicedTensor
    kind: Literal["trained", "frozen", "buffer"]


class FileEntry(_Part):
    """What a file must be: its size in bytes, and its sha256 in hexadecimal."""

    bytes: int
    sha256: str


class Group(_Part):
    """One of the optimizer's parameter groups: its settings, and its parameters' names."""

    names: list[str]
    settings: dict[str, Any]


class Index(_Part):
    """Everything about a checkpoint that is no tensor.

    Attributes:
        step: optimizer steps of the job so far.
        world_size: number of processes that wrote it.
        calls: calls of the optimizer's ``step()``.
        skipped_steps: of them, those that a gradient that was not finite ended.
        groups: the optimizer's parameter groups.
        states: the optimizer's state, by matrix or tensor.
        weights: by name; empty where only the optimizer was saved.
        random_states: names of the states of random number generators, which each process wrote.
        scheduler: state of the learning-rate scheduler.
        job: whatever the training job wants back: data position, its own settings.
        model_config_values: the model's own configuration, where it has one (Hugging Face).
        files: by name.
    """

    step: int
    world_size: int
    calls: int
    skipped_steps: int
    groups: list[Group]
    states: dict[str, StateEntry]
    weights: dict[str, Weight]
    random_states: list[str]
    scheduler: dict[str, Any] | None
    job: dict[str, Any]
    model_config_values: dict[str, Any] | None
    files: dict[str, FileEntry]


def file_name(process: int, world_size: int) -> str:
    """Name of the file of one of `world_size` processes."""
    return f"process-{process:05d}-of-{world_size:05d}.safetensors"


def tensor_key(section: Literal["state", "weight", "random"], name: str, part: str = "") -> str:
    """What a slice is called in the file of the process that wrote it."""
    return "/".join(each for each in (section, name, part) if each)


def read_index(checkpoint: Path) -> Index:
    """The index of the checkpoint in a folder.

    Raises:
        CheckpointError: there is none, it is damaged, or it was written by a later version.
    """
    path = checkpoint / INDEX_NAME
    try:
        envelope = json.loads(path.read_bytes())
    except FileNotFoundError:
        why = f"it has no {INDEX_NAME}" if checkpoint.is_dir() else "no such folder"
        raise CheckpointError(
            f"{checkpoint}: {why}; give the folder of a checkpoint, such as .../step-00000100"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); give every process the right to read it, "
            "or use another checkpoint"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error}); use another checkpoint") from None
    if not isinstance(envelope, dict) or envelope.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: damaged, or not the index of a checkpoint of arg_dist; use another one"
        )
    version = envelope.get("schema_version")
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: written with schema version {version!r} by {envelope.get('written_by')}; "
            f"this arg_dist reads version {SCHEMA_VERSION}; use the arg_dist that wrote it"
        )
    content = envelope.get("content")
    if envelope.get("sha256") != _digest(content):
        raise CheckpointError(f"{path}: damaged (sha256 of its content); use another checkpoint")
    try:
        return Index.model_validate(content)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise CheckpointError(
            f"{path}: damaged ({where}: {fault['msg']}); use another checkpoint"
        ) from None


def index_bytes(index: Index, written_by: str) -> bytes:
    """The index as it is written, by a software of that name and version."""
    content = index.model_dump(mode="json")
    envelope = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "written_by": written_by,
        "sha256": _digest(content),
        "content": content,
    }
    return json.dumps(envelope).encode()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
