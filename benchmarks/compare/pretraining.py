"""One pre-training run: a method, its learning rates, a seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from arg_dist.checkpoint.files import write_atomically
from arg_dist.planning.llama import model_config
from benchmarks.compare.measuring import Measurements
from benchmarks.compare.methods import Method
from benchmarks.compare.optimizers import Training, prepare
from launchers.pretraining.models import build_model, count_parameters
from launchers.pretraining.schedule import warmup_cosine
from launchers.pretraining.tokens import Sequences
from launchers.reporting.measures import LOSS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Show = Callable[[str], None]


@dataclass(frozen=True)
class PretrainingJob:
    """Settings shared by all runs of a comparison.

    `device` is a torch device type; `dtype` that of the model's products, ``fp32`` or ``bf16`` (by
    autocast; weights are fp32); `compile` tells whether ``torch.compile`` compiles the model.
    """

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
    dtype: str = "fp32"
    compile: bool = False

    def tokens(self, step: int) -> int:
        """Number of tokens seen after `step`."""
        return step * self.batch_size * self.seq_len


class Diverged(Exception):
    """A loss or gradient is no longer finite."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"step {step}: {what}")


@dataclass
class _Progress:
    """What a run has come to, and all that its next steps depend on.

    Attributes:
        training: the model and its optimizers.
        measured: the measurements so far.
        curve: step, tokens and held-out loss of each evaluation.
        done: completed steps.
        seconds: those of earlier processes.
    """

    training: Training
    measured: Measurements
    curve: list[tuple[int, int, float]] = field(default_factory=list)
    done: int = 0
    seconds: float = 0.0
    _began: float = field(default_factory=time.perf_counter)

    def keep(self, path: Path, run: dict[str, Any]) -> None:
        """Write everything to `path`; `run` tells which run it is of."""
        kept = {
            "run": run,
            "model": self.training.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.training.optimizers],
            "random": torch.get_rng_state(),
            "measured": self.measured.so_far(),
            "curve": self.curve,
            "done": self.done,
            "seconds": self.seconds + time.perf_counter() - self._began,
        }
        write_atomically(path, lambda temporary: torch.save(kept, temporary))

    def resume(self, path: Path, run: dict[str, Any]) -> None:
        """Read what an earlier process wrote of the same run, if it did."""
        if not path.exists():
            return
        kept = torch.load(path, weights_only=False)  # projectors are objects
        if kept["run"] != run:
            return
        self.training.model.load_state_dict(kept["model"])
        for optimizer, state in zip(self.training.optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        torch.set_rng_state(kept["random"])
        self.measured.go_on_from(kept["measured"])
        self.curve, self.done, self.seconds = kept["curve"], kept["done"], kept["seconds"]


def pretrain(
    job: PretrainingJob,
    method: Method,
    *,
    lr: float,
    rest_lr: float,
    seed: int,
    tokens: Path,
    show: Show,
    kept: Path | None = None,
    watch: Callable[[int, nn.Module], None] | None = None,
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
        kept: file that holds the run after each evaluation, from which an interrupted one goes on;
            None: nothing is kept.
        watch: called with the step and the model before the first step and at each evaluation.

    Returns:
        The results as JSON; ``status`` is ``finished`` or ``diverged``.
    """
    sequences = read_sequences(tokens, job.seq_len, job.vocab_size, seed=seed)
    config = model_config(job.model, vocab_size=job.vocab_size, length=job.seq_len)
    model = build_model(job.model, config, seed=seed, deepspeed_config={}).to(job.device)
    if job.compile:
        _compile(model, job.device)
    torch.manual_seed(seed)
    training = prepare(method, model, lr=lr, rest_lr=rest_lr, weight_decay=job.weight_decay)
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    progress = _Progress(training, Measurements(training))
    run = {"job": asdict(job), "method": method.definition(), "rates": (lr, rest_lr), "seed": seed}
    if kept is not None:
        progress.resume(kept, run)
    if watch is not None and not progress.done:
        watch(0, model)
    status, why = "finished", None
    try:
        for step in range(progress.done + 1, job.steps + 1):
            loss = _train(progress, sequences, job, step)
            progress.done = step
            if step % job.eval_every == 0 or step == job.steps:
                held_out = held_out_loss(model, sequences, job)
                check_finite(held_out, step, "held-out loss")
                progress.curve.append((step, job.tokens(step), held_out))
                progress.measured.at_evaluation(step)
                show(f"step {step}: loss {loss:.4f}, held-out loss {held_out:.4f}")
                if watch is not None:
                    watch(step, model)
                if kept is not None and step < job.steps:
                    progress.keep(kept, run)
    except Diverged as error:
        status, why = "diverged", str(error)
    return {
        "status": status,
        "error": why,
        "measure": LOSS,
        "final": progress.curve[-1][2] if status == "finished" else None,
        "steps": progress.done,
        "parameters": count_parameters(model),
        "curve": progress.curve,
        "earlier_seconds": progress.seconds,
        **progress.measured.as_json(job.steps),
    }


def _compile(model: PreTrainedModel, device: str) -> None:
    if device == "cpu":  # torch's fused attention is slower there than compiled equations
        model.set_attn_implementation("eager")
    model.forward = torch.compile(model.forward, dynamic=False)


def _train(progress: _Progress, sequences: Sequences, job: PretrainingJob, step: int) -> float:
    """Train for one step, counted from 1, and return its loss."""
    training, clock = progress.training, progress.measured.clock
    ratio = warmup_cosine(
        step - 1, steps=job.steps, warmup=job.warmup, min_lr_ratio=job.min_lr_ratio
    )
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = ratio * group["initial_lr"]
    clock.begin_step()
    loss = _forward_and_backward(training.model, sequences, job, step)
    trained = [p for p in training.model.parameters() if p.requires_grad]
    nn.utils.clip_grad_norm_(trained, job.clip)
    check_finite(loss, step, "loss")
    clock.begin_optimizer()
    _step(training.optimizers, step)
    clock.end_optimizer()
    for optimizer in training.optimizers:
        optimizer.zero_grad()
    clock.end_step()
    progress.measured.after_step(step)
    return loss


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
        with _products_in(job):
            loss = model(input_ids=ids, labels=ids).loss / parts
        loss.backward()
        total += loss.item()
    return total


def _products_in(job: PretrainingJob) -> torch.autocast:
    return torch.autocast(job.device, torch.bfloat16, enabled=job.dtype == "bf16")


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
        with _products_in(job):
            total += model(input_ids=ids, labels=ids).loss.item() * len(indices)
    model.train()
    return total / job.eval_sequences


def check_finite(value: float, step: int, what: str) -> None:
    """Raise Diverged if `value` is NaN or infinite."""
    if not math.isfinite(value):
        raise Diverged(step, f"the {what} is {value}")
