"""Files that are whole or not there: written, forced to the disk, and only then named."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from arg_dist.checkpoint.index import CheckpointError, FileEntry
from arg_dist.config import ConfigError
from arg_dist.sharding.communicator import Communicator

T = TypeVar("T")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Writes tensors to a new file, forces it to the disk, and says what must be found in it.

    Args:
        path: the file.
        tensors: contiguous, in the host's memory.

    Raises:
        CheckpointError: it could not be written.
    """
    try:
        save_file(dict(tensors), path)
        path.chmod(path.parent.stat().st_mode & 0o666)  # it is made for its owner alone
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        return describe(path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary neighbour of `path`, then renames it into place.

    Readers see what was there before, or all of the new content, also after a crash.

    Args:
        path: the file.
        write: takes the temporary file's path, whose suffix says nothing of the format.

    Raises:
        OSError: it could not be written; what was there before is untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """:func:`write_atomically` for a small file of a checkpoint.

    Raises:
        CheckpointError: it could not be written.
    """
    try:
        write_atomically(path, lambda partial: partial.write_bytes(content))
    except OSError as error:
        raise cannot_write(path, error) from None


def sync_folder(folder: Path) -> None:
    """Forces the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe(path: Path) -> FileEntry:
    """Size and sha256 of a file as it is."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(bytes=path.stat().st_size, sha256=digest)


def verify(path: Path, expected: FileEntry) -> None:
    """Reads a file to its end and compares it with what was written.

    Raises:
        CheckpointError: it is not there, or is another one.
    """
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            raise CheckpointError(
                f"{path}: has {size} bytes where {expected.bytes} were written; use another "
                "checkpoint"
            )
        if describe(path) != expected:
            raise CheckpointError(
                f"{path}: damaged (its sha256 is not the one that was written); use another "
                "checkpoint"
            )
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; use another checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def on_all(communicator: Communicator, work: Callable[[], T]) -> list[T]:
    """Does `work` on every process; what each of them returned, or an error on all of them.

    Raises:
        CheckpointError: the first process's that failed. An error that is no fault of files or
            settings is its cause on the process that raised it.
    """
    result: T | None = None
    fault, unexpected = None, None
    try:
        result = work()
    except (CheckpointError, ConfigError, OSError) as error:
        fault = str(error)
    except Exception as error:  # whatever it is, the others must not wait for this process
        fault, unexpected = f"{type(error).__name__}: {error}", error
    outcomes = communicator.gather_objects((fault, result), "saving or loading a checkpoint")
    for process, (other, _) in enumerate(outcomes):
        if other is not None:
            where = f"process {process}: " if communicator.size > 1 else ""
            raise CheckpointError(where + other) from unexpected
    return [each for _, each in outcomes]


def cannot_write(path: Path, error: Exception) -> CheckpointError:
    """What is said of a file or folder that the system did not let be written."""
    cause = error.strerror if isinstance(error, OSError) and error.strerror else error
    return CheckpointError(
        f"{path}: cannot be written ({cause}); make room or give a folder that every process may "
        "write to; checkpoints written before are as they were"
    )
