"""Builds the Trainer of a fine-tuning job, runs it, and saves the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arg_dist.cli.parsing import is_first_process
from arg_dist.integrations.accelerate import check_accelerator, engine_name
from arg_dist.integrations.trainer import for_trainer
from launchers.finetuning.recording import OptimizerCheck, RecordingCallback
from launchers.finetuning.tasks import Task
from launchers.pretraining.interrupts import StopRequest
from launchers.pretraining.models import count_parameters
from launchers.pretraining.progress import TrainingProgress
from launchers.reporting import Earlier, RunFacts, RunRecord, run_facts

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

TYPE_NAMES = {"adarankgrad": "AdaRankGrad", "adamw": "AdamW"}


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer by name, the settings that the user passed, and all its settings."""

    name: str
    given: dict[str, Any]
    settings: dict[str, Any]

    def trainer_arguments(self) -> dict[str, Any]:
        """The settings that are arguments of the Trainer as well."""
        beta1, beta2 = self.settings["betas"]
        return {
            "learning_rate": self.settings["lr"],
            "weight_decay": self.settings["weight_decay"],
            "adam_beta1": beta1,
            "adam_beta2": beta2,
            "adam_epsilon": self.settings["eps"],
        }


def build_trainer(task: Task, args: TrainingArguments, optimizer: OptimizerChoice) -> Trainer:
    """The Trainer of `task`; the model's new weights depend on ``args.seed`` alone.

    Raises:
        InputError: the checkpoint does not fit the task.
        ConfigError: a setting of the optimizer is unknown or out of range, or accelerate does not
            train as configured.
    """
    from transformers import set_seed

    from arg_dist.integrations.callback import AdaRankGradCallback

    chosen: dict[str, Any] = {}
    if optimizer.name == "adarankgrad":
        chosen["optimizer_cls_and_kwargs"] = for_trainer(args, **optimizer.given)
    set_seed(args.seed)
    trainer = trainer_of(task, args, task.build_model(), **chosen)
    check_accelerator(trainer.accelerator)
    if optimizer.name == "adarankgrad":
        trainer.add_callback(OptimizerCheck())
        if args.report_to:
            trainer.add_callback(AdaRankGradCallback())
    return trainer


def trainer_of(task: Task, args: TrainingArguments, model: Any, **chosen: Any) -> Trainer:
    """A Trainer of `model` with the examples and metrics of `task`, which prints nothing.

    `chosen` are further arguments of the Trainer, for example the optimizer.
    """
    from transformers import Trainer
    from transformers.trainer_callback import PrinterCallback

    trainer = Trainer(
        model=model,
        args=args,
        data_collator=task.collator,
        train_dataset=task.training,
        eval_dataset=task.held_out,
        processing_class=task.tokenizer,
        compute_metrics=task.compute_metrics,
        compute_loss_func=task.compute_loss,
        **chosen,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def facts_of(trainer: Trainer, task: Task, optimizer: OptimizerChoice, model: str) -> RunFacts:
    """What the report records of a job before its first step."""
    args = trainer.args
    alone = args.world_size == 1 and not trainer.is_deepspeed_enabled
    return run_facts(
        engine="PyTorch" if alone else engine_name(trainer.accelerator),
        world_size=args.world_size,
        model=Path(model).resolve().name,
        model_parameters=count_parameters(trainer.model),
        optimizer=TYPE_NAMES[optimizer.name],
        optimizer_settings=optimizer.settings,
        measure=task.measure,
        batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        micro_batch_size=args.train_batch_size,
        accumulation_steps=args.gradient_accumulation_steps,
        epochs=args.num_train_epochs if args.max_steps < 0 else None,
        schedule=str(args.lr_scheduler_type.value),
        warmup_ratio=args.warmup_steps,
        clip=args.max_grad_norm,
        group_by_length=args.train_sampling_strategy == "group_by_length",
        precision=args.mixed_precision.replace("no", "fp32"),
        seed=args.seed,
        **task.facts,
    )


def planned_steps(trainer: Trainer) -> int:
    """The optimizer steps of the whole job."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    batches = len(trainer.get_train_dataloader())
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


def run_job(
    trainer: Trainer,
    facts: RunFacts,
    stop: StopRequest,
    *,
    out: Path,
    checkpoint: str | None,
    sample_every: int,
) -> int | None:
    """Trains until the last step or a signal; writes the report, and the model to ``out/model``.

    Returns:
        The number of the signal that stopped the run early, or None.
    """
    first, steps = is_first_process(), planned_steps(trainer)
    earlier = Earlier(int(checkpoint.rpartition("-")[2])) if checkpoint else None
    with (
        RunRecord(out, facts, planned_steps=steps, active=first, earlier=earlier) as record,
        TrainingProgress(steps, shown=first) as progress,
    ):
        recording = RecordingCallback(record, progress, stop, sample_every=sample_every)
        trainer.add_callback(recording)
        trainer.train(resume_from_checkpoint=checkpoint)
        if recording.stopped_by is None:
            if not recording.is_evaluated:
                trainer.evaluate()
            save_model(trainer, out / "model")
        recording.flush(trainer.optimizer, last=True)
    record.finish("interrupted" if recording.stopped_by else "finished")
    trainer.accelerator.wait_for_everyone()
    return recording.stopped_by


def save_model(trainer: Trainer, directory: Path) -> None:
    """Saves model and tokenizer for ``from_pretrained``; sharded weights are gathered."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and trainer.is_fsdp_enabled:
        plugin.set_state_dict_type("FULL_STATE_DICT")  # otherwise the Trainer saves nothing here
    trainer.save_model(str(directory))
