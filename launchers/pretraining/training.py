"""What a training loop asks of whatever shards its model, and where that comes from."""

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
"""Makes an optimizer's learning-rate scheduler."""


class Engine(ABC):
    """A model in training.

    Attributes:
        name: what shards it, for the report.
        module: the model as it is called.
        model: the model itself, without what the engine puts around it.
        optimizer: the optimizer itself, without its wrappers.
        scheduler: the learning rate's.
        batch: the sequences of a step.
        device: where they go.
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

        Each `batch.accumulation`-th call moves the weights.
        """

    def extra_state(self) -> dict[str, Any]:
        """What the engine itself must know to go on from a checkpoint, as JSON."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:  # noqa: B027 - most have none
        """Takes over :meth:`extra_state`, which may be another engine's: what is known of it."""

    def train_step(self, sequences: Sequences, step: int) -> Tensor:
        """One optimizer step on this process's part of the global batch; its mean loss."""
        micro, accumulation = self.batch.micro, self.batch.accumulation
        first = dist.get_rank() * micro * accumulation
        total = torch.zeros((), device=self.device)
        for start in range(first, first + micro * accumulation, micro):
            ids = sequences.batch(step, range(start, start + micro)).to(self.device)
            total += self.micro_step(ids).detach().float()
        return total / accumulation

    @torch.no_grad()
    def held_out_loss(self, sequences: Sequences, batches: int) -> float:
        """The mean loss over `batches` global batches of held-out sequences, always the same."""
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
    """How a job gets its engine. In this order: the processes, the configuration, the engine.

    The configuration of every engine is written like a DeepSpeed JSON: ``optimizer``, the sizes of
    the batch, ``gradient_clipping``.
    """

    @abstractmethod
    def connect(self, time_limit: timedelta | None) -> None:
        """Joins the job's processes.

        Args:
            time_limit: how long a process waits for one that has stopped answering; None for
                the engine's default.

        Raises:
            InputError: the engine that was asked for cannot be had; or the first process cannot
                open the port where the others look for it.
        """

    @abstractmethod
    def read_config(self) -> dict[str, Any]:
        """What the user wrote for the engine, without values that he left to others."""

    @abstractmethod
    def check(self, config: dict[str, Any]) -> None:
        """Looks for what cannot work in the completed `config`, before a model is built.

        Raises:
            InputError: the first fault.
        """

    @abstractmethod
    def build(
        self, model: nn.Module, config: dict[str, Any], batch: Batch, schedule: Schedule
    ) -> Engine:
        """The engine of `model`, with the optimizer that ``config["optimizer"]`` names.

        Raises:
            InputError: the optimizer or the engine refuses a setting.
        """


def unusable_port(launcher_option: str) -> InputError:
    """The error of a job whose first process cannot open its port."""
    return InputError(
        f"port {os.environ['MASTER_PORT']} cannot be used, perhaps by another job's doing; "
        f"give the launcher another one with {launcher_option}"
    )


def leave_processes() -> None:
    """Ends what :meth:`Setup.connect` began; without it gloo's threads may abort the exit."""
    if dist.is_initialized():
        gc.collect()  # whatever still holds a group would keep its threads from being joined
        dist.destroy_process_group()
