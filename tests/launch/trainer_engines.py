"""Engines under Hugging Face's Trainer."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

import arg_dist
from arg_dist.integrations.accelerate import check_optimizer
from tests.launch import models
from tests.launch.cases import SETTINGS, STEPS
from tests.launch.training import CLIP, Run, ranks_now


class Rows(Dataset[dict[str, torch.Tensor]]):
    """The batches of all steps, one after the other."""

    def __init__(self) -> None:
        self.tokens = torch.cat([models.batch(step) for step in range(STEPS)])

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class InOrder(Trainer):
    """Takes the rows as they come, so that every engine sees the same global batches."""

    def _get_train_sampler(self, *ignored: Any, **more: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Recorder(TrainerCallback):
    """Notes the losses that the Trainer logs, and the ranks."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.ranks: list[dict[str, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.ranks.append(ranks_now(check_optimizer(more["optimizer"])))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


FSDP2 = {
    "version": 2,
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
}


def train(**options: Any) -> tuple[Run, nn.Module]:
    """What the Trainer's users do, and the model as its engine left it.

    Args:
        **options: more ``TrainingArguments``.
    """
    processes = dist.get_world_size()
    with tempfile.TemporaryDirectory() as directory:
        args = TrainingArguments(
            output_dir=directory,
            per_device_train_batch_size=models.BATCH // processes,
            max_steps=STEPS,
            learning_rate=SETTINGS["lr"],
            lr_scheduler_type="constant",
            max_grad_norm=CLIP,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        settings = {key: value for key, value in SETTINGS.items() if key != "lr"}
        recorder = Recorder()
        job = InOrder(
            models.build("llama"),
            args,
            train_dataset=Rows(),
            callbacks=[recorder],
            optimizer_cls_and_kwargs=arg_dist.for_trainer(args, **settings),
        )
        job.train()
    return {"losses": recorder.losses, "ranks": recorder.ranks}, job.model_wrapped
