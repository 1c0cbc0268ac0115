"""Trains under many engines in one launch.

    PYTHONPATH=. torchrun --nproc_per_node 2 tests/launch/engine_runs.py --out FILE --cases fsdp2

Writes what every process saw under each of them.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.patience import patient

faulthandler.dump_traceback_later(patient(340), exit=True)  # a deadlock shows where it stands

import deepspeed  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # saves its compilation

from accelerate.state import AcceleratorState  # noqa: E402

from launchers.pretraining.training import leave_processes  # noqa: E402
from tests.installed import GLOO_ENDS  # noqa: E402
from tests.launch import engine_ways  # noqa: E402
from tests.launch.engines import ENGINES, Engine  # noqa: E402


def run(engine: Engine) -> list[Any]:
    """What each process saw; accelerate's settings do not outlive it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with mock.patch.dict(os.environ):
        mine = getattr(engine_ways, engine.way)(**engine.options)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # or the collections that DeepSpeed asks for would go through every module
    dist.init_process_group("gloo")
    chosen = [engine for engine in ENGINES if engine.name in options.cases]
    results: dict[str, Any] = {engine.name: {"processes": run(engine)} for engine in chosen}
    results["environment"] = {k: v for k, v in os.environ.items() if k.startswith("ACCELERATE_")}
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps(results, indent=1))
    dist.barrier()
    if not GLOO_ENDS:
        os._exit(0)
    leave_processes()


if __name__ == "__main__":
    main()
