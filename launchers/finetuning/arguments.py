"""The Trainer's arguments for a job: batch, engine, DeepSpeed JSON."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from arg_dist.cli.parsing import InputError
from arg_dist.integrations.accelerate import asks_for
from launchers.pretraining.environment import quiet_libraries
from launchers.pretraining.job_config import set_batch
from launchers.pretraining.models import zero_stage

if TYPE_CHECKING:
    from transformers import TrainingArguments

DEFAULT_BATCH = 32
PRECISIONS = ("bf16", "fp16")


def quiet_trainer(*, with_deepspeed: bool) -> None:
    """Silences the startup logging of transformers and DeepSpeed; warnings still appear."""
    import transformers

    if with_deepspeed:
        quiet_libraries()
    transformers.utils.logging.disable_progress_bar()
    # transformers warns about the weights of a new head, which is intended here.
    transformers.utils.logging.set_verbosity_error()


def processes() -> int:
    """How many processes the launcher has started, before they are connected."""
    return int(os.environ.get("WORLD_SIZE", 1))


def divide_batch(config: dict[str, Any], total: int | None, micro: int | None) -> dict[str, int]:
    """The Trainer's arguments for a global batch of `total` examples in micro batches of `micro`.

    Completes a DeepSpeed `config`, in which these two take precedence.

    Raises:
        InputError: the sizes are inconsistent.
    """
    if micro is not None:
        config["train_micro_batch_size_per_gpu"] = micro
    if not config.keys() & {"train_batch_size", "train_micro_batch_size_per_gpu"}:
        total = total or DEFAULT_BATCH
    _, each, accumulation = set_batch(config, total, processes())
    return {
        "per_device_train_batch_size": each,
        "per_device_eval_batch_size": each,
        "gradient_accumulation_steps": accumulation,
    }


def clipping(config: dict[str, Any], norm: float | None) -> dict[str, float]:
    """The Trainer's argument for gradient clipping, which is also set in a DeepSpeed `config`."""
    found = config.get("gradient_clipping", 1.0) if norm is None else norm
    config["gradient_clipping"] = found
    return {"max_grad_norm": found}


def training_arguments(
    out: Path, config: dict[str, Any] | None, *, precision: str | None, **settings: Any
) -> TrainingArguments:
    """Initializes the process group, and creates the Trainer's arguments.

    Args:
        out: the run's directory.
        config: DeepSpeed's, completed: its batch sizes and clipping are those of `settings`.
        precision: ``"bf16"`` or ``"fp16"`` for the forward and backward pass (weights stay fp32);
            None leaves it to ``accelerate launch`` or to `config`, which converts the weights.
        **settings: other fields of ``TrainingArguments``.

    Raises:
        InputError: `out` cannot be created, or the Trainer rejects a setting.
    """
    from transformers import TrainingArguments

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from None
    settings |= {
        "output_dir": str(out / "checkpoints"),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "disable_tqdm": True,  # the job has its own progress bar and log lines
        "log_level": "error",
        "log_level_replica": "error",
        "save_total_limit": 2,
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    if config is not None:
        if zero_stage(config) == 3:  # otherwise the Trainer cannot save the model
            config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
        settings["deepspeed"] = config
        if precision is not None:
            raise InputError(
                f"--precision {precision}: not available under DeepSpeed; enable {precision} in "
                "its JSON"
            )
        precision = next((p for p in PRECISIONS if config.get(p, {}).get("enabled")), None)
    if precision == "fp16" and not torch.accelerator.is_available():
        # accelerate would silently train in fp32
        raise InputError("fp16: needs a GPU, and this machine has none; use bf16 or fp32")
    if precision is not None:
        settings[precision] = True
    try:
        if not torch.accelerator.is_available():
            settings |= _on_cpus(config)
        return TrainingArguments(**settings)
    except (ValueError, ImportError, torch.distributed.DistNetworkError) as error:
        raise InputError(f"Trainer: {' '.join(str(error).split())}") from None


def _on_cpus(config: dict[str, Any] | None) -> dict[str, Any]:
    """The settings that accelerate needs on CPUs to recognize all processes."""
    if config is not None:
        # By default it initializes no backend, and every process runs as if it were the only one.
        from accelerate import PartialState

        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
        return {"accelerator_config": {"use_configured_state": True}, "use_cpu": True}
    if asks_for("DEEPSPEED") or asks_for("FSDP"):
        return {"ddp_backend": "gloo"}
    return {"use_cpu": True}


def reporting(where: str) -> dict[str, str]:
    """The Trainer's argument for reporting in addition to this job's own files.

    Raises:
        InputError: the integration is unknown, or its package is not installed.
    """
    from transformers.integrations import get_available_reporting_integrations

    available = sorted(get_available_reporting_integrations())
    if where not in ("none", *available):
        raise InputError(
            f"--report-to {where}: unknown or not installed; available: "
            f"{', '.join(['none', *available])}"
        )
    return {"report_to": where}


def schedule_of(
    steps: int | None, epochs: float, every: int | None, save: int | None
) -> dict[str, Any]:
    """The Trainer's arguments for how long to train, and when to evaluate and save.

    Without `every` each epoch ends with an evaluation; without `save` there are no checkpoints.
    """
    length: dict[str, Any] = {"num_train_epochs": epochs} if steps is None else {"max_steps": steps}
    length |= {"eval_strategy": "steps", "eval_steps": every} if every else {
        "eval_strategy": "epoch"
    }  # fmt: skip
    return length | (
        {"save_strategy": "steps", "save_steps": save} if save else {"save_strategy": "no"}
    )


def last_checkpoint(directory: Path, *, resume: bool) -> str | None:
    """The checkpoint to resume from, or None for a new run.

    Raises:
        InputError: no checkpoint was found, or a new run would mix its own with an earlier run's.
    """
    from transformers.trainer_utils import get_last_checkpoint

    found = get_last_checkpoint(str(directory)) if directory.is_dir() else None
    if resume and found is None:
        raise InputError(
            f"--resume: no checkpoint in {directory}; was the run started with --save-every?"
        )
    if found is not None and not resume:
        raise InputError(
            f"--out {directory.parent}: holds checkpoints of an earlier run; continue it with "
            "--resume, remove them, or choose another directory"
        )
    return found
