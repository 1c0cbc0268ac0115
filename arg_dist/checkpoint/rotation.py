"""A series of checkpoints: saved in the background, rotated, and resumed from the newest intact."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from arg_dist.checkpoint.files import on_all, sync_folder, write_bytes
from arg_dist.checkpoint.index import CheckpointError
from arg_dist.checkpoint.lock import lock_folder
from arg_dist.checkpoint.reading import Restored, restore, verified_index
from arg_dist.checkpoint.scheduling import check_scheduler
from arg_dist.checkpoint.writing import Draft, draft, write
from arg_dist.optimizer import AdaRankGrad
from arg_dist.sharding.entry import entry_point
from arg_dist.sharding.job import for_host_data, job_communicator

LATEST_NAME = "latest"
_NAME = re.compile(r"step-(\d+)(\.replaced|\.abandoned)?")
_LEFTOVER = re.compile(r"\.(step-\d+|latest)(\.replaced|\.abandoned)?\.(partial|removed)")

log = logging.getLogger("arg_dist")


class SaveTimes(NamedTuple):
    """Cost of one save on this process.

    Attributes:
        step: optimizer steps of the job up to the checkpoint.
        stall_seconds: how long training was blocked by waiting for the previous save and copying.
        write_seconds: time to complete the checkpoint, in the background unless disabled.
        bytes: bytes written by this process.
    """

    step: int
    stall_seconds: float
    write_seconds: float
    bytes: int


class Checkpoints:
    """A folder of checkpoints ``step-00000100`` etc.; the file ``latest`` names the newest.

    Every process of the job creates one and calls its methods at the same steps. While it exists,
    no other job can use the folder. If a job resumes from an older checkpoint than the newest, its
    first save appends ``.abandoned`` to the names of the later ones; each of them is removed once
    the job has passed its step.

    Args:
        folder: folder of the checkpoints, on a file system shared by all processes.
        optimizer: the AdaRankGrad itself, without wrappers, after the engine has taken it over.
        model: the model, to save its configuration and what the optimizer does not train.
        scheduler: the learning-rate scheduler, or any object with ``state_dict`` (of data; see
            :func:`arg_dist.checkpoint.values.encode`) and ``load_state_dict``.
        keep: number of checkpoints to keep.
        background: whether to write in a thread, overlapped with training.
        time_limit: seconds that one process waits for the others.

    Attributes:
        times: cost of each completed save.

    Raises:
        ValueError: `keep` is below 1.
        CheckpointError: on every process: the folder is not writable, is in use by another job, or
            is not the same on all processes; or the scheduler's state cannot be stored.
    """

    @entry_point
    def __init__(
        self,
        folder: str | Path,
        optimizer: AdaRankGrad,
        *,
        model: nn.Module | None = None,
        scheduler: Any = None,
        keep: int = 3,
        background: bool = True,
        time_limit: float = 1800,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep: got {keep}; at least 1 is needed")
        self.folder = Path(folder)
        self.times: list[SaveTimes] = []
        self._optimizer, self._model, self._scheduler = optimizer, model, scheduler
        self._keep = keep
        job = job_communicator(optimizer.process_group, optimizer.bind())
        self._processes = for_host_data(job, time_limit)
        on_all(self._processes, partial(check_scheduler, scheduler))
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[SaveTimes] | None = None
        self._lock = lock_folder(self.folder, self._processes, time_limit)
        on_all(self._processes, self._clear_leftovers)

    @entry_point
    def save(self, step: int, job: Mapping[str, Any] | None = None) -> None:
        """Saves; with `background`, returns once everything is copied to host memory.

        Args:
            step: optimizer steps of the job so far.
            job: data that :meth:`load` returns, as it is now, with the types it has now; what the
                first process gives. See :func:`arg_dist.checkpoint.values.encode`.

        Raises:
            CheckpointError: on every process: this checkpoint or the previous one could not be
                written. Earlier checkpoints are unchanged.
        """
        began = time.perf_counter()
        self.wait()
        prepared = draft(
            self._optimizer,
            model=self._model,
            scheduler=self._scheduler,
            step=step,
            job=job,
            weights=True,
        )
        stall = time.perf_counter() - began
        if self._thread is None:
            self.times.append(self._write(prepared, 0.0)._replace(stall_seconds=0.0))
            seconds = time.perf_counter() - began
            self.times[-1] = self.times[-1]._replace(stall_seconds=seconds)
        else:
            self._pending = self._thread.submit(self._write_beside, prepared, stall)

    @entry_point
    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
            CheckpointError: on every process: the checkpoint could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self.times.append(pending.result())

    @entry_point
    def load(self, which: str | Path = "auto") -> Restored | None:
        """Loads the newest intact checkpoint, or a given one.

        Args:
            which: `auto`, or the folder of a checkpoint.

        Returns:
            What was restored; with `auto`, None if there are no checkpoints.

        Raises:
            CheckpointError: on every process: the checkpoint is damaged or belongs to another
                model; with `auto`, all checkpoints are damaged.
        """
        self.wait()
        if which != "auto":
            return self._load(Path(which))
        passed_over: list[str] = []
        found = self.found()
        for checkpoint in reversed(found):
            try:
                index = verified_index(checkpoint, self._processes)
            except CheckpointError as error:
                passed_over.append(str(error))
                continue
            return replace(self._load(checkpoint, index), passed_over=passed_over)
        if found:
            raise CheckpointError(
                f"{self.folder}: none of its checkpoints is intact: " + "; ".join(passed_over)
            )
        return None

    @entry_point
    def found(self) -> list[Path]:
        """Lists the checkpoints in the folder as the first process sees them, newest last."""
        return on_all(self._processes, self._found)[0]

    def _load(self, checkpoint: Path, index: Any = None) -> Restored:
        return restore(
            checkpoint,
            index or verified_index(checkpoint, self._processes),
            self._optimizer,
            model=self._model,
            scheduler=self._scheduler,
            weights=True,
        )

    def _write_beside(self, prepared: Draft, stall: float) -> SaveTimes:
        try:
            return self._write(prepared, stall)
        except Exception as error:  # raised at the next call, which may come late or never
            if self._processes.me == 0:
                log.error("the checkpoint of step %d was not saved: %s", prepared.index.step, error)
            raise

    def _write(self, prepared: Draft, stall: float) -> SaveTimes:
        began = time.perf_counter()
        step = prepared.index.step
        checkpoint = self.folder / f"step-{step:08d}"
        on_all(self._processes, lambda: self._set_aside(checkpoint))
        write(prepared, checkpoint, self._processes)
        on_all(self._processes, lambda: self._point_to(checkpoint))
        written = sum(tensor.nbytes for tensor in prepared.tensors.values())
        return SaveTimes(step, stall, time.perf_counter() - began, written)

    # -- operations of the first process in the folder -------------------------------------------

    def _found(self) -> list[Path]:
        if self._processes.me != 0 or not self.folder.is_dir():
            return []
        return checkpoints_in(self.folder)

    def _set_aside(self, checkpoint: Path) -> None:
        """Renames a checkpoint of the same step, so that it survives if this save fails."""
        if self._processes.me != 0 or not checkpoint.exists():
            return
        latest = self.folder / LATEST_NAME
        named = latest.exists() and latest.read_text().strip() == checkpoint.name
        if named:  # `latest` never names a checkpoint that does not exist
            others = [path for path in checkpoints_in(self.folder) if path != checkpoint]
            self._write_latest(others[-1] if others else None)
        replaced = _put_away(checkpoint, ".replaced")
        if named:
            self._write_latest(replaced)

    def _point_to(self, checkpoint: Path) -> None:
        """Updates ``latest`` and removes the checkpoints that are not kept."""
        if self._processes.me != 0:
            return
        self._write_latest(checkpoint)
        there = _order(self.folder)
        now = there[checkpoint].step
        for path, order in there.items():
            if order.current and order.step > now:
                _put_away(path, ".abandoned")
        behind = {path: order for path, order in there.items() if order.step <= now}
        kept = [
            p for p, order in behind.items() if order.current and (order.whole or order.step < now)
        ]
        for path in behind:
            if path not in kept[-self._keep :]:
                _remove(path)

    def _write_latest(self, checkpoint: Path | None) -> None:
        path = self.folder / LATEST_NAME
        if checkpoint is None:
            path.unlink(missing_ok=True)
        else:
            write_bytes(path, f"{checkpoint.name}\n".encode())

    def _clear_leftovers(self) -> None:
        """Removes incomplete files of runs that were killed during a save."""
        if self._processes.me == 0 and self.folder.is_dir():
            for path in self.folder.iterdir():
                if _LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def checkpoints_in(folder: Path) -> list[Path]:
    """Lists checkpoints by step, a replaced one before its successor, after all abandoned ones."""
    return list(_order(folder))


class _Order(NamedTuple):
    """Sort key of a checkpoint, from its name."""

    current: bool
    step: int
    whole: bool


def _order(folder: Path) -> dict[Path, _Order]:
    names = {path: _NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()}
    found = {
        path: _Order(name[2] != ".abandoned", int(name[1]), name[2] is None)
        for path, name in names.items()
        if name
    }
    return dict(sorted(found.items(), key=itemgetter(1)))


def _put_away(checkpoint: Path, suffix: str) -> Path:
    """Renames a checkpoint, replacing any that has the new name; returns the new path."""
    aside = checkpoint.with_name(checkpoint.name.partition(".")[0] + suffix)
    _remove(aside)
    checkpoint.rename(aside)
    sync_folder(checkpoint.parent)
    return aside


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint without ever leaving a part of it under its name."""
    if checkpoint.exists():
        removed = checkpoint.with_name(f".{checkpoint.name}.removed")
        try:
            shutil.rmtree(removed, ignore_errors=True)
            checkpoint.rename(removed)
            sync_folder(checkpoint.parent)
            shutil.rmtree(removed)
        except OSError as error:
            raise CheckpointError(
                f"{removed}: this old checkpoint cannot be removed ({error.strerror}); remove it "
                "by hand; the newer checkpoints are complete"
            ) from None
