"""A folder of checkpoints is one job's at a time, and all processes of the job see the same one."""

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

CLAIM_NAME = ".claim"
WAIT_SECONDS = 120.0
"""How long a job waits for the one before it, which may be ending. Where the machine of that one is
gone, network file systems find out after a while (NFS 4 after 90 seconds)."""
QUIET_SECONDS = 2.0

log = logging.getLogger("arg_dist")

_TAKEN = (errno.EAGAIN, errno.EACCES)
_held: weakref.WeakValueDictionary[tuple[int, int], Claim] = weakref.WeakValueDictionary()
"""By device and inode: closing a file once would give up all locks that this process has on it."""


class Claim:
    """A lock on a file, which ends with this object or the process, however that ends.

    Args:
        descriptor: of the open file.

    Attributes:
        token: what the file holds, found nowhere else.
    """

    def __init__(self, descriptor: int) -> None:
        weakref.finalize(self, os.close, descriptor)
        self.token = f"process {os.getpid()} on {socket.gethostname()} {uuid.uuid4().hex}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, self.token.encode(), 0)
        os.fsync(descriptor)


def claim(folder: Path, processes: Communicator, time_limit: float) -> Claim | None:
    """Makes the folder if need be, and keeps other jobs from saving in it; for all processes.

    Args:
        folder: the folder.
        processes: of the job.
        time_limit: seconds that they wait for each other.

    Returns:
        On the first process, the claim: it lasts as long as somebody keeps it.

    Raises:
        CheckpointError: on every process: the folder cannot be written to, is another job's, or
            is not the same on all processes.
    """
    own: list[Claim] = []

    def take() -> str:
        if processes.me == 0:
            own.append(_take(folder, min(WAIT_SECONDS, time_limit / 2)))
        return own[0].token if own else ""

    token = on_all(processes, take)[0]

    def compare() -> None:
        found = "" if own else _read(folder / CLAIM_NAME)
        if not own and found != token:
            raise CheckpointError(
                f"{folder}: is not the folder that process 0 has under this name; checkpoints "
                "must lie on a file system that all processes share"
            )

    on_all(processes, compare)
    return own[0] if own else None


def _take(folder: Path, seconds: float) -> Claim:
    path = folder / CLAIM_NAME
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
        claimed = Claim(descriptor)
    except OSError as error:
        raise cannot_write(folder, error) from None
    status = os.fstat(descriptor)
    _held[status.st_dev, status.st_ino] = claimed
    return claimed


def _lock(descriptor: int, folder: Path, seconds: float) -> None:
    # a lock of the process, not of the open file: processes forked from this one must not have it
    began, told = time.monotonic(), False
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
                f"{folder}: another job saves its checkpoints here ({holder}); end it, or give "
                "this job a folder of its own; if that machine is gone, remove "
                f"{folder / CLAIM_NAME}"
            )
        if waited > QUIET_SECONDS and not told:
            told = True
            log.warning("%s: waiting up to %.0f s for %s to leave it", folder, seconds, holder)
        time.sleep(0.1)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
