"""Saves with DeepSpeed's own checkpoints in mid-run, loads into a fresh engine, and goes on.

deepspeed --num_gpus 2 tests/launch/resume_runs.py --out DIRECTORY
"""

import argparse
import faulthandler
import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

faulthandler.dump_traceback_later(100, exit=True)

import deepspeed  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel(logging.ERROR)

import models  # noqa: E402
from cases import CASES, RESUMED, Case  # noqa: E402

import arg_dist  # noqa: E402

STEPS, SAVED_AFTER = 12, 7


def build(case: Case) -> Any:
    micro = models.BATCH // dist.get_world_size()
    return arg_dist.initialize(model=models.build(case.model), config=case.config(micro))[0]


def train(engine: Any, first: int, last: int) -> list[float]:
    share, losses = models.BATCH // dist.get_world_size(), []
    for step in range(first, last):
        tokens = models.batch(step)[dist.get_rank() * share :][:share]
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


def resume(case: Case, directory: Path) -> dict[str, Any]:
    engine = build(case)
    before = train(engine, 0, SAVED_AFTER)
    engine.save_checkpoint(str(directory), tag="middle")
    uninterrupted = train(engine, SAVED_AFTER, STEPS)
    engine.destroy()
    engine = build(case)
    engine.load_checkpoint(str(directory), tag="middle")
    continued = train(engine, SAVED_AFTER, STEPS)
    engine.destroy()
    return {"before": before, "uninterrupted": uninterrupted, "continued": continued}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    results = {name: resume(CASES[name], options.out / name) for name in RESUMED}
    if dist.get_rank() == 0:
        (options.out / "results.json").write_text(json.dumps(results, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
