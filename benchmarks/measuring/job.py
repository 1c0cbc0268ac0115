"""One process of a measured job: ``python -m benchmarks.measuring.job JOB.json FOLDER``.

JOB.json contains ``kind`` and the arguments of the function of that name. Each process writes its
figures, or ``{"error": ...}`` if it fails, to FOLDER/process-K.json.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measuring.accounting import Holdings, PeakMemory, held_state
from benchmarks.measuring.allocations import Step, peak_of_a_step
from benchmarks.measuring.contenders import NEVER, Matrices, in_one_line, optimizers_of, step_of
from benchmarks.measuring.engines import VOCABULARY, ZERO, build
from benchmarks.measuring.overlap_job import steps_in_turns
from benchmarks.measuring.shapes import Place, Shape, layer_shapes
from benchmarks.measuring.timing import wait_for_device
from launchers.pretraining.environment import prepare_environment, quiet_libraries
from launchers.pretraining.training import leave_processes
from launchers.reporting.files import write_json

STEPS = 3
"""Steps before memory is read; the first allocates the state."""

WARM_UP, SMALL = Shape(64, 32, 2), "pico"
"""Matrices and a model for a warm-up, so that lazy loading by libraries is not measured."""


def step_alone(
    *, name: str, model: str, layers: int | None, rank: int, device: str
) -> dict[str, Any]:
    """Memory of an optimizer step on the matrices of a model's layers, in fp32, on one process.

    Args:
        name: optimizer, one of ``contenders.NAMES``.
        model: a size of ``LLAMA_SIZES``.
        layers: number of layers; None for that of the model.
        rank: rank of every low-rank method.
        device: device to run on.
    """
    place, shapes = Place(torch.device(device), torch.float32), layer_shapes(model, layers)
    warm_up = step_of(name, Matrices([WARM_UP], place), rank=1, gap=1)
    for _ in range(STEPS):  # excludes lazy loading by libraries
        warm_up()
    matrices = Matrices(shapes, place)
    memory = PeakMemory(place.device)
    optimizers = optimizers_of(name, matrices, rank=rank)
    memory.begin()
    for _ in range(STEPS):
        for optimizer in optimizers:
            optimizer.step()
    wait_for_device()
    figures = {"peak": memory.beyond, "state": held_state(optimizers)._asdict()}
    del optimizers, matrices

    def prepare(gap: int) -> Step:
        return step_of(name, Matrices(shapes, place), rank=rank, gap=gap)

    for key, gap in (("temporary", NEVER), ("temporary_with_new_bases", 1)):
        figures[key] = peak_of_a_step(partial(prepare, gap), device=place.device)
    return figures


def training(
    *,
    engine: str,
    name: str,
    model: str,
    rank: int,
    device: str,
    steps: int,
    batch: int,
    length: int,
) -> dict[str, Any]:
    """Memory of a process in training, at the last of `steps`.

    Args:
        engine: one of ``engines.ENGINES``.
        name: optimizer, one of ``contenders.NAMES``.
        model: a size of ``LLAMA_SIZES``.
        rank: rank of every low-rank method.
        device: ``cpu``, or the device type of the GPUs.
        steps: number of steps, at least 2.
        batch: sequences per process and step.
        length: sequence length in tokens.
    """
    place = _join(engine, torch.device(device))
    small = build("none", name, SMALL, rank=1, length=length, device=place)
    small.train(torch.zeros(1, length, dtype=torch.long, device=place))
    del small  # excludes lazy loading by libraries
    memory = PeakMemory(place)
    trained = build(engine, name, model, rank=rank, length=length, device=place)
    holdings = Holdings(trained.model, trained.optimizers)
    generator = torch.Generator().manual_seed(int(os.environ.get("RANK", 0)))
    seconds = []
    memory.begin()
    for _ in range(steps):
        ids = torch.randint(VOCABULARY, (batch, length), generator=generator).to(place)
        holdings.begin()
        wait_for_device()
        began = time.perf_counter()
        trained.train(ids)
        wait_for_device()
        seconds.append(time.perf_counter() - began)
    return {
        "peak": memory.beyond,
        "weights": holdings.weights,
        "gradients": holdings.gradients,
        "state": held_state(trained.optimizers)._asdict(),
        "seconds": seconds,
    }


def overlap(**job: Any) -> dict[str, Any]:
    """Run :func:`.overlap_job.steps_in_turns` with the arguments `job`."""
    _join(job["engine"], torch.device(job["device"]))
    return steps_in_turns(**job)


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "step_alone": step_alone,
    "training": training,
    "overlap": overlap,
}


def main(job_path: str, folder: str) -> int:
    """Run the job at `job_path` and write this process's figures to `folder`."""
    job = json.loads(Path(job_path).read_text())
    # the parent that enforces the limit may have been killed
    faulthandler.dump_traceback_later(job.pop("limit"), exit=True)
    prepare_environment()
    if (threads := job.pop("threads")) is not None:
        torch.set_num_threads(threads)
    out = Path(folder, f"process-{os.environ['RANK']}.json")
    try:
        write_json(out, KINDS[job.pop("kind")](**job))
    except Exception as error:
        write_json(out, {"error": in_one_line(error)})
        raise
    finally:
        leave_processes()
    return 0


def _join(engine: str, device: torch.device) -> torch.device:
    """Initialize the process group and return this process's device."""
    if engine in ZERO:
        quiet_libraries()  # before DeepSpeed initializes its communication
    if device.type != "cpu":
        device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(device.index)
    if engine != "none":
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    return device


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
