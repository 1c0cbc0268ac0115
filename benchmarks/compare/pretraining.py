"""One pre-training run: a method, its learning rates, a seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from arg_dist.planning.llama import model_config
from benchmarks.compare.measuring import Measurements
from benchmarks.compare.methods import Method
from benchmarks.compare.optimizers import prepare
from launchers.pretraining.models import build_model, count_parameters
from launchers.pretraining.schedule import WarmupCosine
from launchers.pretraining.tokens import Sequences
from launchers.reporting.measures import LOSS

Show = Callable[[str], None]


@dataclass(frozen=True)
class PretrainingJob:
    """Settings shared by all runs of a comparison; `device` is a torch device type."""

    model: str
    vocab_size: int
    steps: int
    batch_size: int
    micro_batch: int
    seq_len: int
    warmup: int
    min_lr_ratio: float
    clip: float
    weight_decay: float
    eval_every: int
    eval_sequences: int
    device: str

    def tokens(self, step: int) -> int:
        """Number of tokens seen after `step`."""
        return step * self.batch_size * self.seq_len


class Diverged(Exception):
    """A loss or gradient is no longer finite."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"step {step}: {what}")


def pretrain(
    job: PretrainingJob,
    method: Method,
    *,
    lr: float,
    rest_lr: float,
    seed: int,
    tokens: Path,
    show: Show,
) -> dict[str, Any]:
    """Pre-train; initial weights and batches depend on `seed` alone.

    Args:
        job: the settings shared by all runs.
        method: the method to train with.
        lr: peak learning rate of the low-rank matrices.
        rest_lr: that of all other parameters.
        seed: seeds the weights and batches.
        tokens: directory of ``training.npy`` and ``held_out.npy``.
        show: called with one line at each evaluation.

    Returns:
        The results as JSON; ``status`` is ``finished`` or ``diverged``.
    """
    sequences = read_sequences(tokens, job.seq_len, job.vocab_size, seed=seed)
    config = model_config(job.model, vocab_size=job.vocab_size, length=job.seq_len)
    model = build_model(job.model, config, seed=seed, deepspeed_config={}).to(job.device)
    torch.manual_seed(seed)
    training = prepare(method, model, lr=lr, rest_lr=rest_lr, weight_decay=job.weight_decay)
    optimizers = training.optimizers
    schedulers = [
        WarmupCosine(o, steps=job.steps, warmup=job.warmup, min_lr_ratio=job.min_lr_ratio)
        for o in optimizers
    ]
    trained = [p for p in model.parameters() if p.requires_grad]
    measured = Measurements(training)
    curve: list[tuple[int, int, float]] = []
    clock, status, done, why = measured.clock, "finished", 0, None
    try:
        for step in range(1, job.steps + 1):
            clock.begin_step()
            loss = _forward_and_backward(model, sequences, job, step)
            nn.utils.clip_grad_norm_(trained, job.clip)
            check_finite(loss, step, "loss")
            clock.begin_optimizer()
            _step(optimizers, step)
            clock.end_optimizer()
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                scheduler.step()
                optimizer.zero_grad()
            clock.end_step()
            measured.after_step(step)
            done = step
            if step % job.eval_every == 0 or step == job.steps:
                held_out = held_out_loss(model, sequences, job)
                check_finite(held_out, step, "held-out loss")
                curve.append((step, job.tokens(step), held_out))
                show(f"step {step}: loss {loss:.4f}, held-out loss {held_out:.4f}")
    except Diverged as error:
        status, why = "diverged", str(error)
    return {
        "status": status,
        "error": why,
        "measure": LOSS,
        "final": curve[-1][2] if status == "finished" else None,
        "steps": done,
        "parameters": count_parameters(model),
        "curve": curve,
        **measured.as_json(job.steps),
    }


def read_sequences(directory: Path, length: int, vocab_size: int, *, seed: int) -> Sequences:
    """Memory-map the tokens in `directory`, so that concurrent runs share them."""
    training, held_out = (
        np.load(directory / f"{part}.npy", mmap_mode="r") for part in ("training", "held_out")
    )
    return Sequences(training, held_out, length, seed, vocab_size, str(directory))


def _forward_and_backward(
    model: nn.Module, sequences: Sequences, job: PretrainingJob, step: int
) -> float:
    """Accumulate the mean gradient of the step's batch and return its mean loss."""
    total = 0.0
    parts = math.ceil(job.batch_size / job.micro_batch)
    for first in range(0, job.batch_size, job.micro_batch):
        ids = sequences.batch(step, range(first, first + job.micro_batch)).to(job.device)
        loss = model(input_ids=ids, labels=ids).loss / parts
        loss.backward()
        total += loss.item()
    return total


def _step(optimizers: list[torch.optim.Optimizer], step: int) -> None:
    try:
        for optimizer in optimizers:
            optimizer.step()
    except (FloatingPointError, LinAlgError) as error:
        raise Diverged(step, f"{type(error).__name__}: {error}") from error


@torch.no_grad()
def held_out_loss(model: nn.Module, sequences: Sequences, job: PretrainingJob) -> float:
    """Mean loss over a fixed set of ``job.eval_sequences`` held-out sequences."""
    model.eval()
    total = 0.0
    for first in range(0, job.eval_sequences, job.micro_batch):
        indices = range(first, min(first + job.micro_batch, job.eval_sequences))
        ids = sequences.held_out_batch(indices, job.eval_sequences).to(job.device)
        total += model(input_ids=ids, labels=ids).loss.item() * len(indices)
    model.train()
    return total / job.eval_sequences


def check_finite(value: float, step: int, what: str) -> None:
    """Raise Diverged if `value` is NaN or infinite."""
    if not math.isfinite(value):
        raise Diverged(step, f"the {what} is {value}")
