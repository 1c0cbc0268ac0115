"""The twenty steps that every engine takes, and what must come out of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import arg_dist
from tests.launch import models
from tests.launch.cases import SETTINGS, STEPS
from tests.tolerances import Tolerance

CLIP = 1.0
Run = dict[str, Any]
"""What one process saw at every step: `losses` of the global batches, `ranks` by name, and `sizes`,
the bytes of its optimizer's state."""


class Training(Protocol):
    """A model and its optimizer under some engine."""

    optimizer: arg_dist.AdaRankGrad

    def micro_step(self, tokens: Tensor, share: float, last: bool) -> Tensor:
        """The loss of a micro-batch, which is `share` of the batch; after the last one, a step."""


@dataclass
class TorchTraining:
    """One process, DDP or FSDP2, written out as PyTorch's users do.

    Attributes:
        model: the model under its engine.
        optimizer: its optimizer.
        autocast: type of the products in the forward pass.
        scaler: of the losses.
        sends_each: whether gradients are sent with every micro-batch, not with the last alone.
    """

    model: nn.Module
    optimizer: arg_dist.AdaRankGrad
    autocast: torch.dtype | None = None
    scaler: torch.amp.GradScaler = field(
        default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False)
    )
    sends_each: bool = False

    def micro_step(self, tokens: Tensor, share: float, last: bool) -> Tensor:
        with gradients_kept_back(self.model, not (last or self.sends_each)):
            with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
                loss = self.model(input_ids=tokens, labels=tokens).loss
            self.scaler.scale(loss * share).backward()
        if last:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
        return loss


def gradients_kept_back(model: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """Whether the engine sends gradients only with a later micro-batch, in its own way."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync() if wanted else nullcontext()
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(not wanted)
    return nullcontext()


def train(
    training: Training,
    micro_batches: Sequence[int] = (1,),
    *,
    group: Any = None,
    place: tuple[int, int] | None = None,
    steps: range = range(STEPS),
) -> Run:
    """Twenty steps on this process's share of the global batches.

    Args:
        training: model and optimizer.
        micro_batches: into how many each step's share is cut; begins anew where it ends.
        group: the processes that share a batch; None for this one alone.
        place: which share of a batch this process sees, of how many; None for one each.
        steps: numbers of the steps.
    """
    me, processes = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    at, shares = place or (me, processes)
    share = models.BATCH // shares
    losses, ranks, sizes = [], [], []
    for step in steps:
        mine = models.batch(step)[at * share : (at + 1) * share]
        pieces = mine.chunk(micro_batches[step % len(micro_batches)])
        total = torch.zeros(())
        for i, tokens in enumerate(pieces):
            loss = training.micro_step(tokens, 1 / len(pieces), i + 1 == len(pieces))
            total += loss.detach().float() / len(pieces)
        if group is not None:
            dist.all_reduce(total, group=group)
        losses.append(total.item() / processes)
        ranks.append(ranks_now(training.optimizer))
        sizes.append(training.optimizer.state_bytes())
    return {"losses": losses, "ranks": ranks, "sizes": sizes}


def ranks_now(optimizer: arg_dist.AdaRankGrad) -> dict[str, int]:
    """Rank of each matrix of which this process keeps something."""
    return {entry["name"]: entry["rank"] for entry in optimizer.stats()}


def optimizer_of(model: nn.Module, **more: Any) -> arg_dist.AdaRankGrad:
    """The optimizer of a model, with names, by the settings of all these runs."""
    return arg_dist.AdaRankGrad(arg_dist.param_groups(model), **{**SETTINGS, **more})


def one_process(name: str, weights: torch.dtype = torch.float32, **more: Any) -> TorchTraining:
    """Training of a whole model by a process on its own; `more` settings of the optimizer."""
    model = models.build(name).to(weights)
    return TorchTraining(model, optimizer_of(model, process_group=None, **more))


def difference(run: Run, alone: Run) -> float:
    """Largest difference of the losses of two runs."""
    return max(abs(a - b) for a, b in zip(run["losses"], alone["losses"], strict=True))


def check(runs: Sequence[Run], alone: Run, tolerance: Tolerance, *, ranks: bool = True) -> None:
    """Asserts that processes which trained together saw what one process sees.

    Args:
        runs: what each process saw.
        alone: what one process sees.
        tolerance: of the losses.
        ranks: whether the ranks must be those of one process at every step, too; in any case the
            processes must be of one mind about them.
    """
    for run in runs:
        tolerance.check(difference(run, alone), 0.0)
    for step, everyone in enumerate(zip(*(run["ranks"] for run in runs), strict=True)):
        together = {name: rank for own in everyone for name, rank in own.items()}
        assert all(own.items() <= together.items() for own in everyone), f"step {step}: {everyone}"
        assert not ranks or together == alone["ranks"][step], f"ranks of step {step}"
    assert together.keys() == alone["ranks"][-1].keys()
