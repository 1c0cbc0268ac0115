"""Trains a few steps under many engines in one launch, and tells what they took.

    PYTHONPATH=. torchrun --nproc_per_node 2 tests/launch/planned_runs.py --out FILE

Writes, for each case and process, bytes of tensors at the optimizer's step and bytes that it sent.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.patience import patient

faulthandler.dump_traceback_later(patient(340), exit=True)  # a deadlock shows where it stands

import deepspeed  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

import arg_dist  # noqa: E402
from launchers.pretraining.training import leave_processes  # noqa: E402
from tests.launch.planned_cases import BUCKET, CASES, Case  # noqa: E402
from tests.launch.planned_probe import Probe, model_of, taken, taken_in_torch  # noqa: E402
from tests.launch.torch_engines import ddp, fsdp2  # noqa: E402


def run(case: Case) -> dict[str, Any]:
    """What a process took."""
    if case.engine.startswith("zero"):
        return under_deepspeed(case)
    model = model_of(case)
    if case.engine != "none":
        model = {"ddp": ddp, "fsdp2": fsdp2}[case.engine]()(model, dist.group.WORLD)
    if case.engine == "ddp" and case.settings.get("gradient_sync") == "sketch":
        arg_dist.sketch_only(model)
    return taken_in_torch(case, model, None if case.engine == "none" else "world")


def under_deepspeed(case: Case) -> dict[str, Any]:
    """The same, where DeepSpeed makes the optimizer."""
    config: dict[str, Any] = {
        "train_batch_size": dist.get_world_size(),
        "optimizer": {"type": "AdaRankGrad", "params": case.settings},
        "zero_optimization": {
            "stage": int(case.engine[-1]),
            "reduce_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
        },
        "bf16": {"enabled": case.dtype == "bf16"},
    }
    model = model_of(case, config)
    engine = arg_dist.initialize(model=model, config=config)[0]

    def train(tokens: torch.Tensor) -> None:
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()

    found = taken(case, Probe(model, engine.basic_optimizer), train)
    engine.destroy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # or the collections that DeepSpeed asks for would go through every module
    deepspeed.init_distributed("gloo", verbose=False)
    results = {}
    for case in CASES:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, run(case))
        results[case.name] = everyone
        gc.collect()
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps(results, indent=1))
    leave_processes()


if __name__ == "__main__":
    main()
