"""What launches that save and resume under DeepSpeed share: an engine, its steps, its folders."""

from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import arg_dist
from tests.launch import models, training
from tests.launch.cases import Case
from tests.launch.zero_runs import Disturbance, start

SAVED_AFTER = 8


def other_weights(model: torch.nn.Module) -> None:
    """Changes all that a checkpoint brings back."""
    with torch.no_grad():
        for tensor in chain(model.parameters(), persistent_buffers(model)):
            tensor.add_(0.5)


def other_trained_weights(model: torch.nn.Module) -> None:
    """Changes what DeepSpeed's universal checkpoints bring back."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 if parameter.requires_grad else 0.0)


def persistent_buffers(model: torch.nn.Module) -> list[torch.Tensor]:
    names = model.state_dict().keys()
    return [buffer for name, buffer in model.named_buffers() if name in names]


class Job:
    """Training under DeepSpeed on batches that depend on the step alone."""

    def __init__(self, case: Case, disturb: Disturbance | None = None, **top: Any) -> None:
        config = case.config(models.BATCH // dist.get_world_size())
        self.engine = start(case, {**config, **top}, disturb)
        self.optimizer: arg_dist.AdaRankGrad = self.engine.basic_optimizer

    def train(self, first: int, last: int) -> training.Run:
        """Mean losses over all processes, and ranks, at each step."""
        processes, me = dist.get_world_size(), dist.get_rank()
        share = models.BATCH // processes
        losses, ranks = [], []
        for step in range(first, last):
            tokens = models.batch(step)[me * share :][:share]
            loss = self.engine(input_ids=tokens, labels=tokens).loss
            self.engine.backward(loss)
            self.engine.step()
            total = loss.detach().float()
            dist.all_reduce(total)
            losses.append(total.item() / processes)
            ranks.append(training.ranks_now(self.optimizer))
        return {"losses": losses, "ranks": ranks}

    def weights(self) -> list[float]:
        """A norm of each piece of the weights that this process trains."""
        held = [fragment for plan in self.optimizer.bind() for fragment in plan.held]
        return [float(each.view(each.target.detach()).double().norm()) for each in held]

    def save(self, folder: Path, step: int = 0) -> None:
        arg_dist.checkpoint.save(folder, self.optimizer, model=self.engine.module, step=step)

    def load(self, folder: Path) -> arg_dist.checkpoint.Restored:
        return arg_dist.checkpoint.load(folder, self.optimizer, model=self.engine.module)
