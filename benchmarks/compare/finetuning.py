"""One fine-tuning run: a method, its learning rates, a seed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from transformers import TrainerCallback, set_seed

from benchmarks.compare.finetuning_setup import FinetuningJob
from benchmarks.compare.measuring import Measurements
from benchmarks.compare.methods import Method
from benchmarks.compare.optimizers import prepare
from benchmarks.compare.pretraining import Diverged, check_finite
from launchers.finetuning.arguments import (
    divide_batch,
    quiet_trainer,
    schedule_of,
    training_arguments,
)
from launchers.finetuning.job import trainer_of
from launchers.reporting.measures import LOSS, MEASURES

Show = Callable[[str], None]


def finetune(
    job: FinetuningJob,
    method: Method,
    *,
    lr: float,
    rest_lr: float,
    seed: int,
    show: Show,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Fine-tune with the Trainer.

    Args:
        job: the settings shared by all runs.
        method: the method to train with.
        lr: peak learning rate of the low-rank matrices.
        rest_lr: that of all other parameters.
        seed: seeds the new head, dropout and the order of batches.
        show: called with one line at each evaluation.
        callbacks: of the Trainer, beside its own.

    Returns:
        The results as JSON; ``status`` is ``finished`` or ``diverged``.
    """
    quiet_trainer(with_deepspeed=False)
    task = job.examples()
    set_seed(seed)
    training = prepare(
        method, task.build_model(), lr=lr, rest_lr=rest_lr, weight_decay=job.weight_decay
    )
    watching = Watching(Measurements(training), show, task.measure)
    status, why = "finished", None
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(
            Path(folder),
            None,
            precision=None,
            learning_rate=lr,
            **divide_batch({}, job.batch_size, None),
            **schedule_of(job.steps, job.epochs, None, None),
            lr_scheduler_type="linear",
            warmup_steps=job.warmup_ratio,
            max_grad_norm=job.clip,
            train_sampling_strategy="group_by_length",
            report_to="none",
            seed=seed,
        )
        (optimizer,) = training.optimizers
        trainer = trainer_of(task, args, training.model, optimizers=(optimizer, None))
        for callback in (watching, *callbacks):
            trainer.add_callback(callback)
        try:
            trainer.train()
            if not watching.curve or watching.curve[-1][0] != watching.step:
                trainer.evaluate()
        except Diverged as error:
            status, why = "diverged", str(error)
        except (FloatingPointError, LinAlgError) as error:
            status, why = "diverged", f"step {watching.step + 1}: {type(error).__name__}: {error}"
    return {
        "status": status,
        "error": why,
        "measure": task.measure,
        "final": watching.curve[-1][2] if status == "finished" else None,
        "final_measures": watching.last,
        "steps": watching.step,
        "parameters": training.elements,
        "curve": watching.curve,
        **watching.measured.as_json(trainer.state.max_steps),
    }


class Watching(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Measures the Trainer's steps, and stops a run that diverges.

    Attributes:
        measured: measurements of the optimizer.
        curve: step, tokens seen and value of the measure at each evaluation.
        last: all metrics of the last evaluation.
        step: number of completed steps.
    """

    def __init__(self, measured: Measurements, show: Show, measure: str) -> None:
        self.measured = measured
        self.curve: list[tuple[int, int, float]] = []
        self.last: dict[str, float] = {}
        self.step = 0
        self._show = show
        self._measure = measure

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the step's clock."""
        self.measured.clock.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the optimizer's clock; gradients are already clipped."""
        self.measured.clock.begin_optimizer()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the optimizer's clock."""
        self.measured.clock.end_optimizer()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the step's clock and sample the optimizer."""
        self.measured.clock.end_step()
        self.step = state.global_step
        self.measured.after_step(self.step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Check that the loss is finite.

        Raises:
            Diverged: it is not.
        """
        if "loss" in logs:
            check_finite(float(logs["loss"]), state.global_step, "loss")

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Record the metrics of an evaluation.

        Raises:
            Diverged: the loss is not finite.
        """
        self.last = {key: metrics[f"eval_{key}"] for key in MEASURES if f"eval_{key}" in metrics}
        self.last[LOSS] = metrics["eval_loss"]
        check_finite(self.last[LOSS], self.step, "held-out loss")
        value = self.last[self._measure]
        self.curve.append((self.step, state.num_input_tokens_seen, value))
        self.measured.at_evaluation(self.step)
        self._show(f"step {self.step}: {MEASURES[self._measure].title} {value:.4f}")
