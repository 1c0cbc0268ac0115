"""Engines that accelerate sets up: what its users write, and what they give to it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

import arg_dist
from arg_dist.integrations.accelerate import check_optimizer
from tests.launch import models
from tests.launch.cases import CASES
from tests.launch.cpu_fsdp import as_on_gpus
from tests.launch.training import CLIP, optimizer_of

WRAP = "LlamaDecoderLayer"


@dataclass
class AcceleratedTraining:
    """A loop by accelerate's documentation."""

    accelerator: Accelerator
    model: nn.Module
    prepared: Any
    optimizer: arg_dist.AdaRankGrad

    def micro_step(self, tokens: Tensor, share: float, last: bool) -> Tensor:
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
        self.prepared.step()
        self.prepared.zero_grad()
        return loss


def zero_config(stage: int) -> dict[str, Any]:
    """The JSON of a ZeRO stage, without an optimizer: it comes from Python."""
    config = CASES[f"llama-zero{stage}"].config(models.BATCH // dist.get_world_size())
    del config["optimizer"]
    return config


def deepspeed_plugin(stage: int | None) -> dict[str, Any]:
    """Nothing for the stage that the launcher says."""
    if stage is None:
        return {}
    return {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=zero_config(stage))}


def fsdp2_plugin() -> dict[str, Any]:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[WRAP],
    )
    return {"fsdp_plugin": plugin}


def cpus_as_gpus() -> Any:
    """On CPUs accelerate turns FSDP off, and the Trainer gives all of DeepSpeed's processes the
    same batches; this says that they are GPUs, which talk by gloo.
    """

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    return mock.patch.object(PartialState, "_prepare_backend", as_on_gpus)


def start(**options: Any) -> AcceleratedTraining:
    """Sets up what `options`, or else the launcher, tell accelerate to use."""
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")], **options)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = models.BATCH // accelerator.num_processes
    model = models.build("llama")
    optimizer = optimizer_of(model)
    prepared_model, prepared = arg_dist.prepare(accelerator, model, optimizer)
    return AcceleratedTraining(accelerator, prepared_model, prepared, check_optimizer(prepared))
