"""Prepares optimizers with accelerate, on every engine; writes what the checks say of each."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops.adam
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from arg_dist import AdaRankGrad, ConfigError, param_groups
from arg_dist.integrations.accelerate import check_accelerator, check_optimizer
from launchers.pretraining.training import leave_processes
from tests.launch.accelerate_engines import cpus_as_gpus
from tests.launch.models import build

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class DeepSpeedCPUAdam(torch.optim.Adam):
    """Stands for DeepSpeed's, which takes minutes to compile; accelerate puts it in by itself."""

    def __init__(self, params: Any, adamw_mode: bool, **settings: Any) -> None:
        super().__init__(params, decoupled_weight_decay=adamw_mode, **settings)


deepspeed.ops.adam.DeepSpeedCPUAdam = DeepSpeedCPUAdam


def gloo() -> list[InitProcessGroupKwargs]:
    return [InitProcessGroupKwargs(backend="gloo")]


def ddp() -> Accelerator:
    return Accelerator(cpu=True)


def fsdp(version: int) -> Accelerator:
    """FSDP on CPUs; see cpu_fsdp.py."""
    with cpus_as_gpus():
        return Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=version))


def zero(stage: int, **sections: Any) -> Accelerator:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, **sections},
    }
    return Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), kwargs_handlers=gloo()
    )


def ours(model: torch.nn.Module) -> AdaRankGrad:
    return AdaRankGrad(param_groups(model))


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES: dict[str, tuple[Callable[[], Accelerator], Callable[[Any], Any]]] = {
    "ddp": (ddp, ours),
    "fsdp1": (lambda: fsdp(1), ours),
    "fsdp2": (lambda: fsdp(2), ours),
    "zero2": (lambda: zero(2), ours),
    "zero3": (lambda: zero(3), ours),
    "adamw": (lambda: zero(2), adam),
    "replaced": (lambda: zero(2, **OFFLOAD), ours),
    "replaced, not by ours": (lambda: zero(2, **OFFLOAD), adam),
}


def verdict(accelerator: Accelerator, make: Callable[[Any], Any]) -> str:
    """``"ours"``, or the error."""
    model = build("llama")
    optimizer = make(model)
    try:
        check_accelerator(accelerator)
        _, prepared = accelerator.prepare(model, optimizer)
        return "ours" if check_optimizer(prepared) is optimizer else "another one"
    except ConfigError as error:
        return str(error)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    said = {}
    for name, (accelerator, make) in CASES.items():
        said[name] = verdict(accelerator(), make)
        AcceleratorState._reset_state(reset_partial_state=True)
        for variable in ("DEEPSPEED", "FSDP"):
            os.environ.pop(f"ACCELERATE_USE_{variable}", None)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(said))
    leave_processes()


if __name__ == "__main__":
    main()
