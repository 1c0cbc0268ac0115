"""Finds the checkpoint to resume from and validates the job against it, before any building."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arg_dist.checkpoint.index import CheckpointError, Index, read_index
from arg_dist.checkpoint.rotation import checkpoints_in
from arg_dist.cli.parsing import InputError
from arg_dist.config import current_names
from launchers.pretraining.identity import changes, check_identity

FOLDER = "checkpoints"
"""The directory of a run's checkpoints, inside the run's directory."""

KEEP = 3
"""How many checkpoints are kept by default."""

TIME_LIMIT = 1800
"""Seconds; torch's default."""

AUTO = "auto"
PROGRAM = "train_lm"

FREE_SETTINGS = ("lr", "shard_basis", "collective_timeout", "state_budget")
"""Optimizer settings that may change on resume."""


@dataclass(frozen=True)
class CheckpointPlan:
    """What the command line requests about checkpoints.

    Attributes:
        folder: where they are stored.
        resume: ``auto``, the path of a checkpoint, or None to start from the beginning.
        every: steps between checkpoints; None to save only at the end and at a signal.
        keep: how many are kept.
        time_limit: seconds that a process waits for another while they are written or read.
    """

    folder: Path
    resume: str | None
    every: int | None
    keep: int = KEEP
    time_limit: float = TIME_LIMIT

    @property
    def saves(self) -> bool:
        """Whether the run writes checkpoints."""
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
    """The plan of a run in `out`; None selects a default.

    Raises:
        InputError: `optimizer` is not adarankgrad; or `keep` is given although nothing is saved.
    """
    plan = CheckpointPlan(out / FOLDER, resume, save_every, keep or KEEP, time_limit or TIME_LIMIT)
    if plan.saves and optimizer != "adarankgrad":
        option = "--resume" if resume is not None else "--save-every"
        raise InputError(
            f"{option}: checkpoints hold AdaRankGrad's state, but this run uses --optimizer "
            f"{optimizer}; omit {option}"
        )
    if keep is not None and not plan.saves:
        raise InputError(f"--keep {keep}: nothing is saved; pass --save-every too")
    return plan


@dataclass(frozen=True)
class Found:
    """A checkpoint to resume from: its path, its step, and the description of its job."""

    path: Path
    step: int
    job: dict[str, Any]


def find_checkpoint(plan: CheckpointPlan) -> Found | None:
    """The checkpoint that `plan` requests; with ``auto`` the newest with a readable index.

    Raises:
        InputError: the path holds no checkpoint; checkpoints of several runs would be stored in one
            folder; or another program wrote the checkpoint.
    """
    there = checkpoints_in(plan.folder) if plan.folder.is_dir() else []
    run = f"--out {plan.folder.parent}: holds checkpoints of an earlier run, the last one"
    if plan.resume is None:
        if there:
            raise InputError(
                f"{run} {there[-1].name}; continue it with --resume auto, choose another --out, or "
                f"remove {plan.folder}"
            )
        return None
    if plan.resume == AUTO:
        for path in reversed(there):
            try:
                return _found(path, read_index(path))
            except CheckpointError:  # reported when the series skips it
                continue
        return None
    path = Path(plan.resume)
    if there and path.resolve().parent != plan.folder.resolve():
        raise InputError(
            f"{run} {there[-1].name}; those of a run resumed from {path} would mix with them; "
            f"choose another --out, or remove {plan.folder}"
        )
    try:
        return _found(path, read_index(path))
    except CheckpointError as error:
        raise InputError(f"--resume: {error}") from None


def _found(path: Path, index: Index) -> Found:
    job = index.job_values()
    if job.get("program") != PROGRAM:
        raise InputError(
            f"--resume: {path} was not written by this program, and does not record its position "
            "in the data; load it with arg_dist.checkpoint.load in the program that wrote it"
        )
    return Found(path, index.step, job)


def describe_job(
    *, identity: Mapping[str, Any], schedule: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The description of a job that its checkpoints store, for :func:`check_job`."""
    return {
        "program": PROGRAM,
        "identity": dict(identity),
        "schedule": dict(schedule),
        "settings": dict(settings),
    }


def check_job(
    found: Found, job: dict[str, Any], *, lr: float | None, given: Mapping[str, Any]
) -> list[str]:
    """Checks that `job` may resume from `found`, and adopts the checkpoint's settings.

    Args:
        found: the checkpoint.
        job: of :func:`describe_job`; its settings become those of the checkpoint.
        lr: the peak learning rate, if the user sets it.
        given: other optimizer settings that the user sets.

    Returns:
        The changes that apply from now on, one line each.

    Raises:
        InputError: the checkpoint is another run's, or past the job's last step; the message names
            the option.
    """
    steps = job["schedule"]["steps"]
    if steps < found.step:
        raise InputError(
            f"--steps {steps}: the checkpoint {found.path} is already at step {found.step}; pass "
            "more steps, or --resume an earlier checkpoint"
        )
    check_identity(found.job["identity"], job["identity"], str(found.path))
    saved = current_names(found.job["settings"], str(found.path), saved=True)
    now = job["settings"]
    for key in given:
        if key not in FREE_SETTINGS and saved.get(key) != now[key]:
            raise InputError(
                f"--set {key}={now[key]}: the checkpoint {found.path} was trained with "
                f"{key}={saved.get(key)}, which a resumed run keeps; omit it"
            )
    kept = {key: now[key] for key in FREE_SETTINGS if key in given}
    job["settings"] = {**now, **saved, **kept, "lr": saved["lr"] if lr is None else lr}
    before = {**found.job["schedule"], "lr": saved["lr"]}
    return changes(before, {**job["schedule"], "lr": job["settings"]["lr"]})
