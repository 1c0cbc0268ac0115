"""The training loop's interface to the engine that shards its model, and the engine's setup."""

from __future__ import annotations

import gc
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from arg_dist.cli.parsing import InputError
from launchers.pretraining.job_config import Batch
from launchers.pretraining.schedule import WarmupCosine
from launchers.pretraining.tokens import Sequences

Schedule = Callable[[Optimizer], WarmupCosine]
"""Creates an optimizer's learning-rate scheduler."""


class Engine(ABC):
    """A model in training.

    Attributes:
        name: the engine's name in the report.
        module: the wrapped model, to be called.
        model: the model without the engine's wrappers.
        optimizer: the optimizer without its wrappers.
        scheduler: the learning-rate scheduler.
        batch: the batch sizes.
        device: where the inputs go.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        optimizer: Optimizer,
        batch: Batch,
        *,
        model: nn.Module,
        scheduler: WarmupCosine,
        device: torch.device,
    ) -> None:
        self.name = name
        self.module = module
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.batch = batch
        self.device = device

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @abstractmethod
    def micro_step(self, ids: Tensor) -> Tensor:
        """Trains on sequences `ids`, `batch.micro x length`, and returns their mean loss.

        Every `batch.accumulation`-th call updates the weights.
        """

    def extra_state(self) -> dict[str, Any]:
        """State of the engine itself that resuming needs, as JSON."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:  # noqa: B027 - most have none
        """Restores :meth:`extra_state`, perhaps another engine's; unknown entries are ignored."""

    def train_step(self, sequences: Sequences, step: int) -> Tensor:
        """One optimizer step on this process's share of the global batch; returns its mean loss."""
        micro, accumulation = self.batch.micro, self.batch.accumulation
        first = dist.get_rank() * micro * accumulation
        total = torch.zeros((), device=self.device)
        for start in range(first, first + micro * accumulation, micro):
            ids = sequences.batch(step, range(start, start + micro)).to(self.device)
            total += self.micro_step(ids).detach().float()
        return total / accumulation

    @torch.no_grad()
    def held_out_loss(self, sequences: Sequences, batches: int) -> float:
        """The mean loss over `batches` global batches of held-out sequences, the same each time."""
        micro = self.batch.micro
        count = batches * self.batch.total
        share = count // dist.get_world_size()
        first = dist.get_rank() * share
        total = torch.zeros((), device=self.device)
        self.module.eval()
        for start in range(first, first + share, micro):
            ids = sequences.held_out_batch(range(start, start + micro), count).to(self.device)
            total += self.module(input_ids=ids, labels=ids).loss.float() * micro
        self.module.train()
        dist.all_reduce(total)
        return total.item() / count


class Setup(ABC):
    """Sets up a job's engine, in this order: process group, configuration, engine.

    The configuration of every engine has the layout of a DeepSpeed JSON: ``optimizer``, batch
    sizes, ``gradient_clipping``.
    """

    @abstractmethod
    def connect(self, time_limit: timedelta | None) -> None:
        """Initializes the process group.

        Args:
            time_limit: how long a process waits for one that has stopped responding; None for
                the engine's default.

        Raises:
            InputError: the requested engine is not available; or the first process cannot open
                the port to which the others connect.
        """

    @abstractmethod
    def read_config(self) -> dict[str, Any]:
        """The user's configuration of the engine, without ``"auto"`` values."""

    @abstractmethod
    def check(self, config: dict[str, Any]) -> None:
        """Validates the completed `config` before a model is built.

        Raises:
            InputError: the first error found.
        """

    @abstractmethod
    def build(
        self, model: nn.Module, config: dict[str, Any], batch: Batch, schedule: Schedule
    ) -> Engine:
        """The engine of `model`, with the optimizer that ``config["optimizer"]`` names.

        Raises:
            InputError: the optimizer or the engine rejects a setting.
        """


def unusable_port(launcher_option: str) -> InputError:
    """The error for a port that the first process cannot open."""
    return InputError(
        f"port {os.environ['MASTER_PORT']} cannot be used, perhaps because another job uses it; "
        f"select another one with the launcher's option {launcher_option}"
    )


def leave_processes() -> None:
    """Destroys the process group; otherwise gloo's threads may abort the exit."""
    if dist.is_initialized():
        gc.collect()  # a remaining reference to a group would keep its threads from being joined
        dist.destroy_process_group()
