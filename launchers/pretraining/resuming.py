"""Which checkpoint a job goes on from, and whether it may; found out before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arg_dist.checkpoint.index import CheckpointError, Index, read_index
from arg_dist.checkpoint.series import checkpoints_in
from arg_dist.cli.parsing import InputError
from launchers.pretraining.identity import changes, check_identity

FOLDER = "checkpoints"
"""Where a run's checkpoints lie, in its directory."""

KEEP = 3
"""How many checkpoints stay when nothing else is said."""

TIME_LIMIT = 1800
"""Seconds, as torch's."""

AUTO = "auto"
PROGRAM = "train_lm"

FREE_SETTINGS = ("lr", "shard_basis", "time_limit", "state_budget")
"""Settings of the optimizer that a run may be resumed with other values of."""


@dataclass(frozen=True)
class CheckpointPlan:
    """What the command line says about checkpoints.

    Attributes:
        folder: where they go.
        resume: ``auto``, the path of a checkpoint, or None to start from the beginning.
        every: steps between two of them; None for those at the end and at a signal alone.
        keep: how many stay.
        time_limit: seconds that a process waits for another while they are written or read.
    """

    folder: Path
    resume: str | None
    every: int | None
    keep: int = KEEP
    time_limit: float = TIME_LIMIT

    @property
    def saves(self) -> bool:
        """Whether the run leaves checkpoints."""
        return self.every is not None or self.resume is not None


def plan_checkpoints(
    out: Path,
    optimizer: str,
    *,
    resume: str | None,
    save_every: int | None,
    keep: int | None,
    time_limit: int | None,
) -> CheckpointPlan:
    """The plan of a run in `out`; None leaves a number at its default.

    Raises:
        InputError: `optimizer` is not adarankgrad; or `keep` is given, and nothing is saved.
    """
    plan = CheckpointPlan(out / FOLDER, resume, save_every, keep or KEEP, time_limit or TIME_LIMIT)
    if plan.saves and optimizer != "adarankgrad":
        option = "--resume" if resume is not None else "--save-every"
        raise InputError(
            f"{option}: checkpoints hold AdaRankGrad's state, and this run has --optimizer "
            f"{optimizer}; leave {option} out"
        )
    if keep is not None and not plan.saves:
        raise InputError(f"--keep {keep}: nothing is saved; give --save-every too")
    return plan


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from: where, after which step, and what the job wrote into it."""

    path: Path
    step: int
    job: dict[str, Any]


def find_checkpoint(plan: CheckpointPlan) -> Found | None:
    """The checkpoint that `plan` asks for; with ``auto`` the newest with a readable index.

    Raises:
        InputError: there is none at a path; checkpoints of several runs would lie in one folder;
            or no job of this kind wrote it.
    """
    there = checkpoints_in(plan.folder) if plan.folder.is_dir() else []
    run = f"--out {plan.folder.parent}: a run has left checkpoints there, the last one"
    if plan.resume is None:
        if there:
            raise InputError(
                f"{run} {there[-1].name}; go on with --resume auto, or give another --out, or "
                f"remove {plan.folder}"
            )
        return None
    if plan.resume == AUTO:
        for path in reversed(there):
            try:
                return _found(path, read_index(path))
            except CheckpointError:  # told when it is passed over
                continue
        return None
    path = Path(plan.resume)
    if there and path.resolve().parent != plan.folder.resolve():
        raise InputError(
            f"{run} {there[-1].name}, which those of a run that goes on from {path} would mix "
            f"with; give another --out, or remove {plan.folder}"
        )
    try:
        return _found(path, read_index(path))
    except CheckpointError as error:
        raise InputError(f"--resume: {error}") from None


def _found(path: Path, index: Index) -> Found:
    if index.job.get("program") != PROGRAM:
        raise InputError(
            f"--resume: {path} was not written by this job, and does not tell which data it has "
            "seen; load it by arg_dist.checkpoint.load in the program that wrote it"
        )
    return Found(path, index.step, index.job)


def describe_job(
    *, identity: Mapping[str, Any], schedule: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What a checkpoint keeps of its job, so that :func:`check_job` can know it again."""
    return {
        "program": PROGRAM,
        "identity": dict(identity),
        "schedule": dict(schedule),
        "settings": dict(settings),
    }


def check_job(
    found: Found, job: dict[str, Any], *, lr: float | None, given: Mapping[str, Any]
) -> list[str]:
    """Looks whether `job` may go on from what was `found`, and takes over the latter's settings.

    Args:
        found: the checkpoint.
        job: of :func:`describe_job`; its settings become those of the checkpoint.
        lr: the peak learning rate, if the user gives one.
        given: other settings of the optimizer that the user gives.

    Returns:
        What is done otherwise from now on, in words.

    Raises:
        InputError: it is another run, or one that has come further; the message names the option.
    """
    steps = job["schedule"]["steps"]
    if steps < found.step:
        raise InputError(
            f"--steps {steps}: the checkpoint {found.path} is at step {found.step} already; give "
            "more steps, or --resume an earlier checkpoint"
        )
    check_identity(found.job["identity"], job["identity"], str(found.path))
    saved, now = found.job["settings"], job["settings"]
    for key in given:
        if key not in FREE_SETTINGS and saved.get(key) != now[key]:
            raise InputError(
                f"--set {key}={now[key]}: the checkpoint {found.path} was trained with "
                f"{key}={saved.get(key)}, which a resumed run keeps; leave it out"
            )
    kept = {key: now[key] for key in FREE_SETTINGS if key in given}
    job["settings"] = {**now, **saved, **kept, "lr": saved["lr"] if lr is None else lr}
    before = {**found.job["schedule"], "lr": saved["lr"]}
    return changes(before, {**job["schedule"], "lr": job["settings"]["lr"]})
