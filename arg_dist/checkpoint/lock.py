"""Exclusive use of a folder of checkpoints by one job, whose processes all see the same folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
import uuid
import weakref
from pathlib import Path

from arg_dist.checkpoint.files import cannot_write, on_all
from arg_dist.checkpoint.index import CheckpointError
from arg_dist.sharding.communicator import Communicator

FILE_NAME = ".claim"
WAIT_SECONDS = 120.0
"""How long a job waits for the previous one, which may be exiting. If the machine of that job has
failed, a network file system releases its lock only after a while (NFS 4 after 90 seconds)."""
QUIET_SECONDS = 2.0

log = logging.getLogger("arg_dist")

_TAKEN = (errno.EAGAIN, errno.EACCES)
_held: weakref.WeakValueDictionary[tuple[int, int], FolderLock] = weakref.WeakValueDictionary()
"""By device and inode: closing one descriptor of a file releases all locks of the process on it."""


class FolderLock:
    """A lock on a file, released with this object or when the process exits, however it does.

    Args:
        descriptor: of the open file.

    Attributes:
        token: unique content of the file.
    """

    def __init__(self, descriptor: int) -> None:
        weakref.finalize(self, os.close, descriptor)
        self.token = f"process {os.getpid()} on {socket.gethostname()} {uuid.uuid4().hex}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, self.token.encode(), 0)
        os.fsync(descriptor)


def lock_folder(folder: Path, processes: Communicator, time_limit: float) -> FolderLock | None:
    """Creates the folder if necessary and locks it against other jobs; a collective.

    Args:
        folder: the folder.
        processes: the processes of the job.
        time_limit: seconds that they wait for each other.

    Returns:
        On the first process, the lock, which is held as long as it is referenced.

    Raises:
        CheckpointError: on every process: the folder is not writable, is in use by another job, or
            is not the same on all processes.
    """
    own: list[FolderLock] = []

    def take() -> str:
        if processes.me == 0:
            own.append(_take(folder, min(WAIT_SECONDS, time_limit / 2)))
        return own[0].token if own else ""

    token = on_all(processes, take)[0]

    def compare() -> None:
        found = "" if own else _read(folder / FILE_NAME)
        if not own and found != token:
            raise CheckpointError(
                f"{folder}: is not the folder that process 0 sees under this name; checkpoints "
                "must be on a file system that all processes share"
            )

    on_all(processes, compare)
    return own[0] if own else None


def _take(folder: Path, seconds: float) -> FolderLock:
    path = folder / FILE_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            status = path.stat()
            held = _held.get((status.st_dev, status.st_ino))
            if held is not None:
                return held
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise cannot_write(folder, error) from None
    try:
        _lock(descriptor, folder, seconds)
    except BaseException:
        os.close(descriptor)
        raise
    try:
        taken = FolderLock(descriptor)
    except OSError as error:
        raise cannot_write(folder, error) from None
    status = os.fstat(descriptor)
    _held[status.st_dev, status.st_ino] = taken
    return taken


def _lock(descriptor: int, folder: Path, seconds: float) -> None:
    # a lock of the process, not of the open file, so that forked processes do not inherit it
    began, warned = time.monotonic(), False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in _TAKEN:
                return  # a file system without locks
        waited = time.monotonic() - began
        holder = os.pread(descriptor, 500, 0).decode(errors="replace").rpartition(" ")[0]
        if waited > seconds:
            raise CheckpointError(
                f"{folder}: another job saves its checkpoints here ({holder}); stop it, or give "
                "this job its own folder; if that machine no longer exists, remove "
                f"{folder / FILE_NAME}"
            )
        if waited > QUIET_SECONDS and not warned:
            warned = True
            log.warning("%s: waiting up to %.0f s for %s to release it", folder, seconds, holder)
        time.sleep(0.1)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
