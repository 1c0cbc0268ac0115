"""The checkpoints of a job in training: gone on from, written beside the steps, and measured."""

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
    """What a run of `engine` saves and resumes; nothing, if that is its `plan`.

    All processes call its methods together. As a context manager: an error that ends them all at
    the same step does not cut a save short.

    Args:
        plan: where, how often, how many.
        engine: the model in training.
        job: what identifies the job (:func:`launchers.pretraining.resuming.describe_job`).
    """

    def __init__(self, plan: CheckpointPlan, engine: Engine, job: dict[str, Any]) -> None:
        self._plan, self._engine, self._job = plan, engine, job
        self._latest, self._told = 0, 0
        self._news: list[str] = []
        self._series = None
        if plan.saves:
            assert isinstance(engine.optimizer, AdaRankGrad), "such plans are refused"
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
        # After other errors this process may be the only one to come here.
        if self._series is not None and isinstance(error, FloatingPointError):
            try:
                self._series.wait()
            except CheckpointError as failure:
                error.args = (f"{error}; {failure}",)

    def resume(self, *, new_peak: float | None) -> Earlier:
        """Loads what the plan says, and returns what is behind the run.

        Args:
            new_peak: of the learning rate from now on; None for that of the checkpoint.

        Raises:
            InputError: the checkpoint, or each of all, is damaged; or it is another model's.
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
        # a checkpoint that was taken out of its run has no lines beside it but its own
        run = path.parent.parent if path.parent.name == FOLDER else path
        return Earlier(restored.step, run, **restored.job["progress"])

    def is_due(self, step: int, *, last: bool) -> bool:
        """Whether to save after `step`, the run's `last` or not."""
        every = self._plan.every
        due = last or (every is not None and step % every == 0)
        return self._series is not None and due and step != self._latest

    def save(self, step: int, progress: dict[str, Any]) -> float:
        """Takes a copy of everything and has it written while training goes on.

        Should the save before have failed, this one is completed at once: a full disk may have been
        emptied, but nobody wants to find out at the end of the run that it was not.

        Args:
            step: the last one of all that are in the weights.
            progress: what :meth:`RunRecord.progress` says of it.

        Returns:
            The seconds for which training stood still.

        Raises:
            CheckpointError: this save has failed, too.
        """
        assert self._series is not None, "a save is not due"
        began = time.perf_counter()
        job = {**self._job, "progress": progress, "engine": self._engine.extra_state()}
        try:
            self._series.save(step, job)
        except CheckpointError as error:
            self._news += [f"the checkpoint before was not saved ({error}); again at step {step}"]
            self._series.save(step, job)
            self._series.wait()
        self._latest = step
        return time.perf_counter() - began

    def news(self) -> list[str]:
        """What the user should read: loads, completed saves and failures since the last call."""
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
        """Waits for the last save and tells of all of them; see :meth:`RunRecord.finish`.

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
