"""Agreement of all processes before a step changes anything: one exchange of a few numbers."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arg_dist.subspace.distributed import Exchange, Steps, even_rows
from arg_dist.subspace.fingerprint import TOLERANCE

LARGEST_NORM_SQ = 1e36
"""Squares and products of larger gradients overflow in fp32."""

OWN_STATE, REFRESHING, COMPARES, APART = 1, 2, 4, 8
"""Flags in the lowest 8 bits of the first word of a report; above them steps and settings."""
SETTINGS_BIT = 32
STEPS = (1 << SETTINGS_BIT - 8) - 1
"""Mask of the number of steps in a report, which is compared only."""


@dataclass(frozen=True)
class Likeness:
    """What must be alike on all processes, in short.

    Attributes:
        settings: checksum of the settings, 31 bits.
        summary: of the tensors that every process holds whole, an fp64 scalar; None: none compared.
        apart: this process has found that its part differs from another copy of the model.
    """

    settings: int = 0
    summary: Tensor | None = None
    apart: bool = False


ALIKE = Likeness()


@dataclass(frozen=True)
class Agreement:
    """The agreed values, equal on every process of a group.

    Attributes:
        norm_sq: ``||G||_F^2`` of each matrix and tensor of the plan.
        kept_sq: ``||P||_F^2`` of each matrix in the previous step.
        rounds: communication rounds of each lane in this step.
        strangers: processes that hold optimizer state saved by another process, or whose step
            count differs from the first process's.
        processes: size of the group.
        refreshing: whether any process reports that a matrix of the optimizer is due for a refresh.
        unlike: whether something that must be alike on all processes seems to differ.
    """

    norm_sq: list[float]
    kept_sq: list[float]
    rounds: list[int]
    strangers: list[int]
    processes: int
    refreshing: bool = False
    unlike: bool = False

    def is_usable(self, names: Sequence[str], *, skip: bool) -> bool:
        """Whether the step can be taken.

        Args:
            names: names of the matrices and tensors.
            skip: skip a step with a non-finite gradient instead of raising.

        Raises:
            RuntimeError: a process holds another process's state.
            FloatingPointError: a gradient is not finite and `skip` is not set.
        """
        if self.strangers:
            raise RuntimeError(
                f"load_state_dict: the optimizer state of process "
                f"{', '.join(map(str, self.strangers))} of {self.processes} does not belong with "
                "process 0's: it was loaded from another process, another number of processes, "
                "another model or another step (or step() was called on some processes only); the "
                "state is sharded: each process must save and load its own"
            )
        bad = self.nonfinite()
        if bad and not skip:
            more = f" and {len(bad) - 1} of {len(names) - 1} others" if len(bad) > 1 else ""
            raise FloatingPointError(
                f"the gradient of {names[bad[0]]}{more} is NaN or infinite (or above 1e18); "
                "this call to step() left its parameters and their state unchanged. Lower the "
                "learning rate, clip gradients, check the batch, or set "
                'nonfinite="skip"'
            )
        return not bad

    def nonfinite(self) -> list[int]:
        """Positions of matrices and tensors whose gradient is NaN, infinite or too large."""
        return [i for i, norm_sq in enumerate(self.norm_sq) if not norm_sq < LARGEST_NORM_SQ]


def agree(
    norms_sq: Sequence[tuple[int, Tensor]],
    kept_sq: Sequence[tuple[int, Tensor]],
    rounds: Sequence[int],
    *,
    own_state: bool,
    steps: int,
    units: int,
    processes: int,
    me: int,
    refreshing: bool = False,
    likeness: Likeness = ALIKE,
) -> Steps[Agreement]:
    """Sum squared norms over all processes, and take the maximum number of rounds per lane.

    Args:
        norms_sq: position and ``||G||^2`` over this process's part of each gradient, fp64 scalars;
            each element is held by exactly one process.
        kept_sq: position and ``||P||^2`` over this process's rows, fp64 scalars.
        rounds: rounds that this process's matrices need in each lane.
        own_state: whether this process's optimizer state is its own.
        steps: steps this process's optimizer has taken.
        units: number of matrices and tensors of the plan.
        processes: size of the group.
        me: this process's index.
        refreshing: whether this process has matrices due for a refresh.
        likeness: what must be alike on all processes.
    """
    device = norms_sq[0][1].device if norms_sq else torch.device("cpu")
    part = torch.zeros(units, 2, dtype=torch.float64, device=device)
    for column, values in enumerate((norms_sq, kept_sq)):
        _fill_in(part[:, column], values)
    all_units = ((0, units),) * processes
    all_rows = ((0, processes),) * processes
    flags = OWN_STATE * own_state + REFRESHING * refreshing
    mine = _report(flags, steps, rounds, likeness)
    answers = yield (
        Exchange(part, all_units, all_units),
        Exchange(mine, even_rows(processes, processes), all_rows),
    )
    totals, reports = answers[0].tolist(), answers[1].tolist()
    taken = [_steps_in(report[0]) for report in reports]
    return Agreement(
        norm_sq=[row[0] for row in totals],
        kept_sq=[row[1] for row in totals],
        rounds=[max(needed) for needed in zip(*(report[2:] for report in reports), strict=True)],
        strangers=[
            process
            for process, report in enumerate(reports)
            if not report[0] & OWN_STATE or taken[process] != taken[0]
        ],
        processes=processes,
        refreshing=any(report[0] & REFRESHING for report in reports),
        unlike=_are_unlike(reports),
    )


def _report(flags: int, steps: int, rounds: Sequence[int], likeness: Likeness) -> Tensor:
    """What this process tells each other one: ``1 x (2 + lanes)``, int64."""
    compares = likeness.summary is not None
    flags += COMPARES * compares + APART * likeness.apart
    first = flags | (steps & STEPS) << 8 | likeness.settings << SETTINGS_BIT
    report = torch.tensor([[first, 0, *rounds]], dtype=torch.int64, device="cpu")
    if likeness.summary is not None:
        report = report.to(likeness.summary.device)
        report[0, 1] = likeness.summary.view(torch.int64)
    return report


def _steps_in(word: int) -> int:
    return word >> 8 & STEPS


def _are_unlike(reports: Sequence[Sequence[int]]) -> bool:
    """Whether flags, settings or summaries differ, or a process has found a difference."""
    words = [(report[0] >> SETTINGS_BIT, report[0] & COMPARES) for report in reports]
    first, *others = [_number(report[1]) for report in reports]
    return (
        len(set(words)) > 1
        or any(report[0] & APART for report in reports)
        or any(str(each) != str(first) and not abs(each - first) <= TOLERANCE for each in others)
    )


def _number(word: int) -> float:
    """The fp64 number that has the bits of an int64."""
    number: float = struct.unpack("<d", word.to_bytes(8, "little", signed=True))[0]
    return number


def _fill_in(column: Tensor, values: Sequence[tuple[int, Tensor]]) -> None:
    """Write scalars to their positions in a column; one copy from each device.

    Args:
        column: ``units``.
        values: positions and scalars, on any devices.
    """
    for device in dict.fromkeys(value.device for _, value in values):
        there = [(unit, value) for unit, value in values if value.device == device]
        scalars = torch.stack([value for _, value in there])
        column[[unit for unit, _ in there]] = scalars.to(column.device)
