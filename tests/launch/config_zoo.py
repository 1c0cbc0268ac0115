"""Trains some steps with every DeepSpeed configuration that is shipped.

deepspeed --num_gpus 2 tests/launch/config_zoo.py --out results.json ds_configs/*.json
"""

import argparse
import faulthandler
import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.patience import patient

faulthandler.dump_traceback_later(patient(150), exit=True)

import deepspeed  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel(logging.ERROR)

import models  # noqa: E402

import arg_dist  # noqa: E402
from launchers.pretraining.training import leave_processes  # noqa: E402

STEPS = 8


def train(config: Path) -> dict[str, Any]:
    model = models.build("llama")
    engine = arg_dist.initialize(model=model, config=config)[0]
    micro = engine.train_micro_batch_size_per_gpu()
    me, losses = dist.get_rank(), []
    tokens = models.batch(0)[me * micro : (me + 1) * micro]
    for _ in range(STEPS):
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    result = {
        "losses": losses,
        "stage": engine.zero_optimization_stage(),
        "dtype": str(next(model.parameters()).dtype),
        "optimizer": type(engine.basic_optimizer).__name__,
        "matrices": len(engine.basic_optimizer.stats()),
    }
    engine.destroy()
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("configs", nargs="+", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    results = {config.name: train(config) for config in options.configs}
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps(results, indent=1))
    dist.barrier()
    leave_processes()


if __name__ == "__main__":
    main()
