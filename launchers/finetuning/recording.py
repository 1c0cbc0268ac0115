"""Records the Trainer's progress like that of pre-training: metrics by step, bar, report."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from arg_dist.integrations.accelerate import check_optimizer, innermost
from launchers.pretraining.interrupts import StopRequest
from launchers.pretraining.processes import mean_and_stop
from launchers.pretraining.progress import TrainingProgress
from launchers.reporting import MEASURES, RunRecord, sample_optimizer


class OptimizerCheck(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Verifies that AdaRankGrad is the optimizer that trains.

    Raises:
        ConfigError: it is not; the message gives the reason and the remedy.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks the optimizer as accelerate has prepared it."""
        check_optimizer(kwargs["optimizer"])


class RecordingCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Writes each step to `record` and to the terminal, and stops the run at a signal.

    The Trainer reports a step's loss and its evaluation in separate calls, so a step's line is
    written when the next step begins. All processes must have this callback.

    Args:
        record: receives the lines.
        progress: what the terminal shows.
        stop: a signal to any process stops all of them after the step, with a checkpoint if the
            run saves any.
        sample_every: steps between two samples of the optimizer.

    Raises:
        FloatingPointError: a step's loss is NaN or infinite.
    """

    def __init__(
        self,
        record: RunRecord,
        progress: TrainingProgress,
        stop: StopRequest,
        *,
        sample_every: int,
    ) -> None:
        self._record = record
        self._progress = progress
        self._stop = stop
        self._sample_every = sample_every
        self._line: dict[str, Any] = {}
        self._began = self._seconds = 0.0
        self.stopped_by: int | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the previous step, which is complete now."""
        self.flush(kwargs["optimizer"])
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the time, and checks whether any process received a signal."""
        self._seconds = time.perf_counter() - self._began
        signal = self._stop.signal
        if dist.is_initialized():
            _, signal = mean_and_stop(torch.zeros(()), signal, args.device)
        if signal and state.global_step < state.max_steps:
            self.stopped_by = signal
            control.should_training_stop = True
            control.should_save |= args.save_strategy != "no"

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Records a step's loss; the Trainer logs each step, with the mean over the processes."""
        if "loss" not in logs:
            return
        self._line = {
            "step": state.global_step,
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "seconds": self._seconds,
            "tokens": state.num_input_tokens_seen,
            "epoch": state.epoch,
        }
        if not math.isfinite(logs["loss"]):
            loss = f"the loss of step {state.global_step} is {logs['loss']}"
            raise FloatingPointError(f"{loss}; lower --lr")

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Adds an evaluation to the line of its step."""
        found = {"held_out_loss": metrics["eval_loss"]}
        found |= {key: metrics[f"eval_{key}"] for key in MEASURES if f"eval_{key}" in metrics}
        self._line |= found

    @property
    def is_evaluated(self) -> bool:
        """Whether the latest step was followed by an evaluation."""
        return "held_out_loss" in self._line

    def flush(self, optimizer: Any, *, last: bool = False) -> None:
        """Writes the pending step, if any; all processes must call this together."""
        line, self._line = self._line, {}
        if not line:
            return
        sampled = last or line["step"] == 1 or line["step"] % self._sample_every == 0
        self._record.step(line, sample_optimizer(innermost(optimizer)) if sampled else None)
        self._progress.show(line, self._record.mean_rank)
