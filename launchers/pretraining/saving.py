"""Checkpoints of a running job: resumed from, written in the background, and timed."""

from __future__ import annotations

import time
import warnings
from types import TracebackType
from typing import Any

import torch.distributed as dist

from arg_dist import AdaRankGrad
from arg_dist.checkpoint import CheckpointError, Checkpoints
from arg_dist.cli.parsing import InputError
from arg_dist.config import in_bytes
from launchers.pretraining.resuming import FOLDER, CheckpointPlan
from launchers.pretraining.training import Engine
from launchers.reporting import Earlier
from launchers.reporting.tables import seconds


class RunCheckpoints:
    """Saves and resumes a run of `engine` as `plan` requests; does nothing if it requests nothing.

    All processes call its methods together. As a context manager it completes the save in flight
    when an error ends all processes at the same step.

    Args:
        plan: where to save, how often, and how many to keep.
        engine: the model in training.
        job: what identifies the job (:func:`launchers.pretraining.resuming.describe_job`).
    """

    def __init__(self, plan: CheckpointPlan, engine: Engine, job: dict[str, Any]) -> None:
        self._plan, self._engine, self._job = plan, engine, job
        self._latest, self._told = 0, 0
        self._news: list[str] = []
        self._series = None
        if plan.saves:
            assert isinstance(engine.optimizer, AdaRankGrad), "refused by plan_checkpoints"
            self._series = Checkpoints(
                plan.folder,
                engine.optimizer,
                model=engine.model,
                scheduler=engine.scheduler,
                keep=plan.keep,
                time_limit=plan.time_limit,
            )

    def __enter__(self) -> RunCheckpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After other errors this process may be the only one to get here.
        if self._series is not None and isinstance(error, FloatingPointError):
            try:
                self._series.wait()
            except CheckpointError as failure:
                error.args = (f"{error}; {failure}",)

    def resume(self, *, new_peak: float | None) -> Earlier:
        """Loads the checkpoint that the plan requests, and returns the run's history.

        Args:
            new_peak: peak learning rate from now on; None for that of the checkpoint.

        Raises:
            InputError: the checkpoint, or each candidate, is damaged; or it is another model's.
        """
        wanted = self._plan.resume
        if self._series is None or wanted is None:
            return Earlier()
        with warnings.catch_warnings(record=True) as caught:
            try:
                restored = self._series.load(wanted)
            except CheckpointError as error:
                raise InputError(f"--resume: {error}") from None
        if restored is None:
            self._news += [f"no checkpoint in {self._plan.folder}: starting from the beginning"]
            return Earlier()
        self._engine.load_extra_state(restored.job["engine"])
        if new_peak is not None:
            self._engine.scheduler.set_peak(new_peak)
        processes = f"{restored.world_size} process{'es' if restored.world_size > 1 else ''}"
        self._news += [f"passed over: {each}" for each in restored.passed_over]
        self._news += [f"resumed: {restored.path}, step {restored.step}, written by {processes}"]
        self._news += [str(warning.message) for warning in caught]
        path = restored.path.resolve()
        if path.parent == self._plan.folder.resolve():
            self._latest = restored.step
        # a checkpoint that was moved out of its run comes with no metrics but its own last line
        run = path.parent.parent if path.parent.name == FOLDER else path
        return Earlier(restored.step, run, **restored.job["progress"])

    def is_due(self, step: int, *, last: bool) -> bool:
        """Whether to save after `step`; `last` marks the run's last step."""
        every = self._plan.every
        due = last or (every is not None and step % every == 0)
        return self._series is not None and due and step != self._latest

    def save(self, step: int, progress: dict[str, Any]) -> float:
        """Snapshots the training state and writes it while training continues.

        If the previous save failed, this one is completed before returning: a full disk may have
        been cleared, but a repeated failure must not surface only at the end of the run.

        Args:
            step: the last step that the weights include.
            progress: what :meth:`RunRecord.progress` returns for it.

        Returns:
            The seconds for which training was stalled.

        Raises:
            CheckpointError: this save has failed, too.
        """
        assert self._series is not None, "a save is not due"
        began = time.perf_counter()
        job = {**self._job, "progress": progress, "engine": self._engine.extra_state()}
        try:
            self._series.save(step, job)
        except CheckpointError as error:
            self._news += [
                f"the previous checkpoint was not saved ({error}); saving again at step {step}"
            ]
            self._series.save(step, job)
            self._series.wait()
        self._latest = step
        return time.perf_counter() - began

    def news(self) -> list[str]:
        """Messages for the user: loads, completed saves and failures since the last call."""
        news, self._news = self._news, []
        times = self._series.times if self._series is not None else []
        for save in times[self._told :]:
            news += [
                f"checkpoint of step {save.step}: stall {seconds(save.stall_seconds)}, "
                f"write {seconds(save.write_seconds)}, {in_bytes(save.bytes)} by the first process"
            ]
        self._told = len(times)
        return news

    def finish(self) -> list[dict[str, Any]]:
        """Waits for the last save and returns the figures of all; see :meth:`RunRecord.finish`.

        Raises:
            CheckpointError: the last save failed.
        """
        if self._series is None:
            return []
        self._series.wait()
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self._series.times)
        return [
            {
                "step": parts[0].step,
                "stall_seconds": max(part.stall_seconds for part in parts),
                "write_seconds": max(part.write_seconds for part in parts),
                "bytes": sum(part.bytes for part in parts),
            }
            for parts in zip(*gathered, strict=True)
        ]
