"""What all processes must know before a step changes anything: one exchange of a few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arg_dist.subspace.exchange import Exchange, Steps, even_rows

LARGEST_NORM_SQ = 1e36
"""Squares of larger gradients, and products with them, overflow in fp32."""


@dataclass(frozen=True)
class Agreement:
    """The same on every process of a group.

    Attributes:
        norm_sq: ``||G||_F^2`` of each matrix and tensor of the plan.
        kept_sq: ``||P||_F^2`` of each matrix's step before.
        rounds: rounds of communication that each lane takes in this step.
        strangers: processes that hold optimizer state which another process saved, or that have
            taken another number of steps than the first.
        processes: size of the group.
        refreshing: whether a process said that matrices of the optimizer look for a new basis.
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
            names: of the matrices and tensors.
            skip: whether a step with a gradient that is not finite is left out.

        Raises:
            RuntimeError: a process holds state that is not its own.
            FloatingPointError: a gradient is not finite, and `skip` is not set.
        """
        if self.strangers:
            raise RuntimeError(
                f"load_state_dict: process {', '.join(map(str, self.strangers))} of "
                f"{self.processes} was given optimizer state that another process saved, another "
                "number of processes, another model, or another step; the state is sharded: each "
                "process has to save and load its own"
            )
        bad = self.nonfinite()
        if bad and not skip:
            more = f" and {len(bad) - 1} of {len(names) - 1} others" if len(bad) > 1 else ""
            raise FloatingPointError(
                f"the gradient of {names[bad[0]]}{more} is NaN or infinite (or above 1e18); "
                "weights and state of the parameters in this call are as before it. Lower the "
                "learning rate or clip the gradient, look for the bad batch, or set "
                'nonfinite="skip"'
            )
        return not bad

    def nonfinite(self) -> list[int]:
        """Positions of the matrices and tensors whose gradient is NaN, infinite or too large."""
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
    """Adds up everyone's squared norms, and takes the most rounds that anyone needs for a lane.

    Args:
        norms_sq: position and ``||G||^2`` over this process's part of each gradient, fp64 scalars;
            every element is held by one process only.
        kept_sq: position and ``||P||^2`` over this process's rows, fp64 scalars.
        rounds: rounds that this process's matrices in each lane need.
        own_state: whether this process's optimizer state is its own.
        steps: steps that this process's optimizer has taken.
        units: number of matrices and tensors of the plan.
        processes: size of the group.
        me: this process's index.
        refreshing: whether all processes must know that matrices look for a new basis.
    """
    device = norms_sq[0][1].device if norms_sq else torch.device("cpu")
    part = torch.zeros(units, 2, dtype=torch.float64, device=device)
    if norms_sq:
        part[[unit for unit, _ in norms_sq], 0] = torch.stack([value for _, value in norms_sq])
    if kept_sq:
        part[[unit for unit, _ in kept_sq], 1] = torch.stack([value for _, value in kept_sq])
    everyone = ((0, units),) * processes
    all_rows = ((0, processes),) * processes
    mine = torch.tensor([[int(own_state) + 2 * int(refreshing), steps, *rounds]])
    answers = yield (
        Exchange(part, everyone, everyone),
        Exchange(mine, even_rows(processes, processes), all_rows),
    )
    totals, processes_say = answers[0].tolist(), answers[1].tolist()
    steps_of_first = processes_say[0][1]
    return Agreement(
        norm_sq=[row[0] for row in totals],
        kept_sq=[row[1] for row in totals],
        rounds=[max(needed) for needed in zip(*(said[2:] for said in processes_say), strict=True)],
        strangers=[
            process
            for process, (bits, taken, *_) in enumerate(processes_say)
            if not bits & 1 or taken != steps_of_first
        ],
        processes=processes,
        refreshing=any(bits & 2 for bits, *_ in processes_say),
    )
