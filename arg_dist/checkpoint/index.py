"""A checkpoint's index: what the checkpoint contains, and which rows of it are in which file.

A checkpoint is a folder with ``index.json`` and one safetensors file per process that wrote it. The
index describes matrices, tensors and parameters as they are in the model. The engine and the number
of processes affect only the slices, which any reader assembles as needed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from arg_dist.checkpoint.values import decode, encode
from arg_dist.subspace.state import SUMMED, progress

FORMAT = "arg_dist checkpoint"
SCHEMA_VERSION = 4
PLAIN_VERSION = 1
"""Its `scheduler` and `job` are what JSON leaves of them; since version 2 they are encoded."""
INDEX_NAME = "index.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file and the remedy."""


class _Part(BaseModel):
    # `model_config_values` is a field, though names that begin with "model_" are reserved
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Slice = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=3)]
"""Process, then start and stop in one or more leading dimensions, of what that process wrote.

Before version 4 in one: rows ``[start, stop)``.
"""


class SlicedTensor(_Part):
    """A tensor written by several processes, in slices of its rows or in boxes.

    Attributes:
        shape: of the whole tensor.
        dtype: as torch names it, e.g. ``float32``.
        slices: disjoint, together all of it; :func:`tensor_key` names them in the process's file.
    """

    shape: tuple[int, ...]
    dtype: str
    slices: list[Slice]


class StateEntry(_Part):
    """Optimizer state of one matrix, or of one tensor trained with full-rank Adam.

    Attributes:
        kind: ``matrix`` or ``tensor``.
        shape: as in the model.
        transposed: whether the moments of a tensor are in column-major order.
        side: the side that the basis spans, `right` or `left`; None for a tensor.
        numbers: scalars such as rank, step and gap; see :mod:`arg_dist.subspace.state`.
        lists: lists of numbers.
        tensors: those that are cut by rows; moments of a matrix are ``long x rank``.
        sums: scalars that each process has a term of, by the rows of the moments that it keeps:
            process, first row, value.
    """

    kind: Literal["matrix", "tensor"]
    shape: tuple[int, ...]
    transposed: bool
    side: Literal["right", "left"] | None
    numbers: dict[str, int | float]
    lists: dict[str, list[int | float]] = {}
    tensors: dict[str, SlicedTensor]
    sums: dict[str, list[tuple[int, int, float]]] = {}

    @property
    def rank(self) -> int:
        """Rank of a matrix."""
        return int(progress(self.numbers)["rank"])

    @model_validator(mode="before")
    @classmethod
    def _as_before_version_3(cls, values: Any) -> Any:
        """Sums were fields of their own, empty for tensors."""
        if not isinstance(values, dict) or values.keys().isdisjoint(SUMMED):
            return values
        rest = {key: value for key, value in values.items() if key not in SUMMED}
        return {**rest, "sums": {key: values[key] for key in SUMMED if values.get(key)}}


class Weight(_Part):
    """One parameter or buffer of the model, stored flattened, or in boxes of its own shape.

    Attributes:
        shape: as in the model.
        transposed: whether the elements are in column-major order.
        elements: ``numel``, or the parameter's shape, in slices.
        kind: ``trained`` by the optimizer (the fp32 master weights, where the engine keeps them),
            ``frozen``, or ``buffer``.
    """

    shape: tuple[int, ...]
    transposed: bool
    elements: SlicedTensor
    kind: Literal["trained", "frozen", "buffer"]


class FileEntry(_Part):
    """Expected size of a file in bytes, and its expected sha256 in hexadecimal."""

    bytes: int
    sha256: str


class Group(_Part):
    """One parameter group of the optimizer: names of its parameters, and settings."""

    names: list[str]
    settings: dict[str, Any]


class Index(_Part):
    """Everything in a checkpoint except the tensors.

    Attributes:
        step: optimizer steps of the job so far.
        world_size: number of processes that wrote it.
        calls: calls of the optimizer's ``step()``.
        skipped_steps: how many of these calls skipped the step because of a non-finite gradient.
        groups: the optimizer's parameter groups.
        states: the optimizer's state, by matrix or tensor.
        weights: by name; empty if only the optimizer was saved.
        random_states: names of the random number generator states that each process wrote.
        scheduler: state of the learning-rate scheduler, as :mod:`arg_dist.checkpoint.values`
            encodes it.
        job: data of the training job, such as its position in the data and its own settings,
            likewise.
        model_config_values: configuration of the model, where it has one (Hugging Face).
        files: size and checksum of each file, by name.
        schema_version: of the file that this was read from.
    """

    step: int
    world_size: int
    calls: int
    skipped_steps: int
    groups: list[Group]
    states: dict[str, StateEntry]
    weights: dict[str, Weight]
    random_states: list[str]
    scheduler: Any
    job: dict[str, Any]
    model_config_values: dict[str, Any] | None
    files: dict[str, FileEntry]
    schema_version: int = Field(SCHEMA_VERSION, exclude=True)

    def job_values(self) -> dict[str, Any]:
        """Returns the data of the training job as it was given."""
        values: dict[str, Any] = decode(self.job)
        return values


def file_name(process: int, world_size: int) -> str:
    """Returns the name of the file that one of `world_size` processes writes."""
    return f"process-{process:05d}-of-{world_size:05d}.safetensors"


def tensor_key(section: Literal["state", "weight", "random"], name: str, part: str = "") -> str:
    """Returns the name of a slice in the file of the process that wrote it."""
    return "/".join(each for each in (section, name, part) if each)


def read_index(checkpoint: Path) -> Index:
    """Reads the index of the checkpoint in a folder.

    Raises:
        CheckpointError: the index is missing or damaged, or of another schema version.
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
            f"{path}: cannot be read ({error.strerror}); make it readable for every process, or "
            "use another checkpoint"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error}); use another checkpoint") from None
    if not isinstance(envelope, dict) or envelope.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: damaged, or not the index of an arg_dist checkpoint; use another checkpoint"
        )
    version = envelope.get("schema_version")
    if version not in range(PLAIN_VERSION, SCHEMA_VERSION + 1):
        raise CheckpointError(
            f"{path}: written with schema version {version!r} by {envelope.get('written_by')}; "
            f"this arg_dist reads versions {PLAIN_VERSION} to {SCHEMA_VERSION}; use the version "
            "that wrote it"
        )
    content = envelope.get("content")
    if envelope.get("sha256") != _digest(content):
        raise CheckpointError(f"{path}: damaged (sha256 mismatch); use another checkpoint")
    try:
        index = Index.model_validate(content)
        if version == PLAIN_VERSION:  # what is in it may look like an encoded value
            free = {key: encode(getattr(index, key), key) for key in ("scheduler", "job")}
            return index.model_copy(update={**free, "schema_version": version})
        decode([index.scheduler, index.job])
        return index
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise CheckpointError(
            f"{path}: damaged ({where}: {fault['msg']}); use another checkpoint"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; use the version that wrote it") from None


def index_bytes(index: Index, written_by: str) -> bytes:
    """Serializes an index; `written_by` is the name and version of the writing software."""
    free = ("scheduler", "job", "model_config_values")  # JSON already
    content = index.model_dump(mode="json", exclude=set(free))
    content |= {key: getattr(index, key) for key in free}
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
