"""Atomic files: written and synced to disk under a temporary name, then renamed."""

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
    """Writes tensors to a new file, syncs it to disk, and returns its size and checksum.

    Args:
        path: the file.
        tensors: contiguous, in host memory.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        save_file(dict(tensors), path)
        path.chmod(path.parent.stat().st_mode & 0o666)  # save_file restricts it to its owner
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        return describe(path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary file next to `path`, then renames it to `path`.

    Readers see either the old content or all of the new content, even after a crash.

    Args:
        path: the file.
        write: receives the temporary file's path, whose suffix does not reflect the format.

    Raises:
        OSError: the file cannot be written; the old content is untouched.
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
    """Writes a small file of a checkpoint atomically; see :func:`write_atomically`.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        write_atomically(path, lambda partial: partial.write_bytes(content))
    except OSError as error:
        raise cannot_write(path, error) from None


def sync_folder(folder: Path) -> None:
    """Syncs the entries of a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe(path: Path) -> FileEntry:
    """Returns the current size and sha256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(bytes=path.stat().st_size, sha256=digest)


def verify(path: Path, expected: FileEntry) -> None:
    """Reads a whole file and compares its size and sha256 with those recorded when written.

    Raises:
        CheckpointError: the file is missing, unreadable or different.
    """
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            raise CheckpointError(
                f"{path}: damaged (has {size} bytes where {expected.bytes} were written); use "
                "another checkpoint"
            )
        if describe(path) != expected:
            raise CheckpointError(
                f"{path}: damaged (its sha256 differs from the one in the index); use another "
                "checkpoint"
            )
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; use another checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def on_all(communicator: Communicator, work: Callable[[], T]) -> list[T]:
    """Runs `work` on every process; returns all results, or raises an error on all processes.

    Raises:
        CheckpointError: with the message of the first process that failed. An unexpected error
            (one not about files or settings) is its cause on the process where it occurred.
    """
    result: T | None = None
    fault, unexpected = None, None
    try:
        result = work()
    except (CheckpointError, ConfigError, OSError) as error:
        fault = str(error)
    except Exception as error:  # any error: the other processes must not wait for this one
        fault, unexpected = f"{type(error).__name__}: {error}", error
    outcomes = communicator.gather_objects((fault, result), "saving or loading a checkpoint")
    for process, (other, _) in enumerate(outcomes):
        if other is not None:
            where = f"process {process}: " if communicator.size > 1 else ""
            raise CheckpointError(where + other) from unexpected
    return [each for _, each in outcomes]


def cannot_write(path: Path, error: Exception) -> CheckpointError:
    """Error for a file or folder that cannot be written."""
    cause = error.strerror if isinstance(error, OSError) and error.strerror else error
    return CheckpointError(
        f"{path}: cannot be written ({cause}); free disk space, or give a folder that every "
        "process may write to; earlier checkpoints are unchanged"
    )
