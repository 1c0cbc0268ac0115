"""Build a language model under an engine with one of the measured optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import arg_dist
from arg_dist.planning.llama import model_config
from benchmarks.measuring.contenders import LEARNING_RATE, OURS, optimizers_of, own_settings
from launchers.pretraining.models import build_model

ZERO = {f"zero{stage}": stage for stage in (1, 2, 3)}
ENGINES = ("none", "ddp", *ZERO, "fsdp2")
"""``none`` is a single process with the bare model."""

VOCABULARY = 257
BUCKET = 50_000_000
"""`reduce_bucket_size` in elements, as in ds_configs."""
GAP = 2
"""Refresh interval in steps, so that some steps refresh and some do not."""


class Trained(NamedTuple):
    """A model set up for training.

    Attributes:
        model: the model itself, unwrapped.
        optimizers: the optimizers, unwrapped.
        train: runs one training step on token ids of shape ``batch x length``.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer]
    train: Callable[[Tensor], None]


def build(
    engine: str,
    name: str,
    model: str,
    *,
    rank: int,
    length: int,
    device: torch.device,
    gap: int = GAP,
) -> Trained:
    """Build a fresh `model` under `engine`; the process group must be initialized.

    Args:
        engine: one of :data:`ENGINES`.
        name: optimizer, one of ``contenders.NAMES``.
        model: a size of ``LLAMA_SIZES``.
        rank: rank of every low-rank method.
        length: sequence length in tokens.
        device: device of this process.
        gap: refresh interval in steps.
    """
    config = _deepspeed_config(engine)
    shape = model_config(model, vocab_size=VOCABULARY, length=length)
    fresh = build_model(model, shape, seed=0, deepspeed_config=config)
    if engine in ZERO:
        return _under_deepspeed(fresh, config, name, rank, gap)
    return _under_torch(engine, fresh.to(device), name, rank, gap)


def _under_torch(engine: str, model: nn.Module, name: str, rank: int, gap: int) -> Trained:
    called: nn.Module = model
    device = next(model.parameters()).device
    if engine == "ddp":
        called = DistributedDataParallel(model)
    elif engine == "fsdp2":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for part in (*model.model.layers, model):  # type: ignore[union-attr, misc]
            fully_shard(part, mesh=mesh)
    if name in OURS:
        groups = arg_dist.param_groups(model)
        settings = own_settings(name, rank, gap)
        optimizers: list[Any] = [arg_dist.AdaRankGrad(groups, lr=LEARNING_RATE, **settings)]
    else:
        optimizers = optimizers_of(name, model, rank=rank, gap=gap)

    def train(ids: Tensor) -> None:
        called(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()

    return Trained(model, optimizers, train)


def _under_deepspeed(
    model: nn.Module, config: dict[str, Any], name: str, rank: int, gap: int
) -> Trained:
    import deepspeed

    if name in OURS:
        params = {"lr": LEARNING_RATE, **own_settings(name, rank, gap)}
        config["optimizer"] = {"type": "AdaRankGrad", "params": params}
        engine = arg_dist.initialize(model=model, config=config)[0]
    elif name == "adamw":  # torch_adam, since DeepSpeed's own AdamW requires compilation
        params = {"lr": LEARNING_RATE, "weight_decay": 0.0, "torch_adam": True}
        config["optimizer"] = {"type": "AdamW", "params": params}
        parameters = list(model.parameters())
        engine = deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]
    else:
        config["zero_allow_untested_optimizer"] = True
        (client,) = optimizers_of(name, model, rank=rank, gap=gap)
        engine = deepspeed.initialize(model=model, optimizer=client, config=config)[0]

    def train(ids: Tensor) -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    return Trained(engine.module, [engine.basic_optimizer], train)


def _deepspeed_config(engine: str) -> dict[str, Any]:
    if engine not in ZERO:
        return {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": ZERO[engine],
            "reduce_bucket_size": BUCKET,
            "overlap_comm": False,
        },
        "steps_per_print": 1_000_000,
    }
