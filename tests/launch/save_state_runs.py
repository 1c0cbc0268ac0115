"""Saves by accelerate's ``save_state`` in mid-run, loads into a fresh training, and goes on.

PYTHONPATH=. torchrun --nproc_per_node 2 tests/launch/save_state_runs.py --out DIRECTORY
"""

from __future__ import annotations

import argparse
import faulthandler
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

faulthandler.dump_traceback_later(100, exit=True)

from accelerate.state import AcceleratorState  # noqa: E402

from tests.launch import accelerate_engines as engines  # noqa: E402
from tests.launch import models  # noqa: E402
from tests.launch.training import ranks_now  # noqa: E402

STEPS, SAVED_AFTER = 14, 8


def start(engine: str) -> engines.AcceleratedTraining:
    AcceleratorState._reset_state(reset_partial_state=True)
    if engine == "ddp":
        return engines.start(cpu=True)
    with engines.cpus_as_gpus():
        return engines.start(**engines.fsdp2_plugin())


def train(training: engines.AcceleratedTraining, first: int, last: int) -> list[float]:
    share, losses = models.BATCH // dist.get_world_size(), []
    for step in range(first, last):
        tokens = models.batch(step)[dist.get_rank() * share :][:share]
        losses.append(training.micro_step(tokens, 1.0, last=True).item())
    return losses


def rest(training: engines.AcceleratedTraining, wanted: bool) -> None:
    """Freezes every other parameter, as gradual unfreezing would."""
    for parameter in list(training.model.parameters())[::2]:
        parameter.requires_grad_(not wanted)


def resume(engine: str, folder: Path) -> dict[str, Any]:
    first = start(engine)
    train(first, 0, SAVED_AFTER)
    rest(first, True)
    first.accelerator.save_state(str(folder))
    rest(first, False)
    uninterrupted = train(first, SAVED_AFTER, STEPS)
    second = start(engine)
    second.accelerator.load_state(str(folder))
    rest(second, True)
    second.accelerator.save_state(f"{folder}-again")
    second = start(engine)
    second.accelerator.load_state(f"{folder}-again")
    continued = train(second, SAVED_AFTER, STEPS)
    return {
        "engine": second.accelerator.distributed_type.value,
        "uninterrupted": uninterrupted,
        "continued": continued,
        "ranks_equal": ranks_now(first.optimizer) == ranks_now(second.optimizer),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {engine: resume(engine, options.out / engine) for engine in ("ddp", "fsdp2")}
    (options.out / f"process{dist.get_rank()}.json").write_text(json.dumps(results, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
