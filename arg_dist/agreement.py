"""Agreement of all processes before a step changes anything: one exchange of a few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arg_dist.subspace.exchange import Exchange, Steps, even_rows

LARGEST_NORM_SQ = 1e36
"""Squares and products of larger gradients overflow in fp32."""


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
    """

    norm_sq: list[float]
    kept_sq: list[float]
    rounds: list[int]
    strangers: list[int]
    processes: int
    refreshing: bool = False

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
    """
    device = norms_sq[0][1].device if norms_sq else torch.device("cpu")
    part = torch.zeros(units, 2, dtype=torch.float64, device=device)
    if norms_sq:
        part[[unit for unit, _ in norms_sq], 0] = torch.stack([value for _, value in norms_sq])
    if kept_sq:
        part[[unit for unit, _ in kept_sq], 1] = torch.stack([value for _, value in kept_sq])
    all_units = ((0, units),) * processes
    all_rows = ((0, processes),) * processes
    mine = torch.tensor([[int(own_state) + 2 * int(refreshing), steps, *rounds]])
    answers = yield (
        Exchange(part, all_units, all_units),
        Exchange(mine, even_rows(processes, processes), all_rows),
    )
    totals, reports = answers[0].tolist(), answers[1].tolist()
    steps_of_first = reports[0][1]
    return Agreement(
        norm_sq=[row[0] for row in totals],
        kept_sq=[row[1] for row in totals],
        rounds=[max(needed) for needed in zip(*(report[2:] for report in reports), strict=True)],
        strangers=[
            process
            for process, (bits, taken, *_) in enumerate(reports)
            if not bits & 1 or taken != steps_of_first
        ],
        processes=processes,
        refreshing=any(bits & 2 for bits, *_ in reports),
    )
