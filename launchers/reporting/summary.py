"""``report.json``: what was run, on which machine, and with what result."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from statistics import median
from typing import Any

import torch

from arg_dist.telemetry import OptimizerSample
from launchers.reporting.measures import LOSS, MEASURES, measured

_PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "arg_dist")


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run before its first step; `measure` is a key of ``MEASURES``."""

    command: str
    date: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    engine: str
    world_size: int
    model: str
    model_parameters: int
    optimizer: str
    optimizer_settings: dict[str, Any]
    job: dict[str, Any]
    measure: str = LOSS


def run_facts(
    *,
    engine: str,
    world_size: int,
    model: str,
    model_parameters: int,
    optimizer: str,
    optimizer_settings: dict[str, Any],
    measure: str = LOSS,
    **job: Any,
) -> RunFacts:
    """Adds command, date, versions and hardware to the caller's facts.

    `measure` judges the run. `job` takes everything else worth recording: batch size, sequence
    length, seed, data.
    """
    arguments = [argument for argument in sys.argv if not argument.startswith("--local_rank")]
    return RunFacts(
        command=shlex.join(arguments),
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        versions=versions(),
        hardware=hardware(),
        engine=engine,
        world_size=world_size,
        model=model,
        model_parameters=model_parameters,
        optimizer=optimizer,
        optimizer_settings=optimizer_settings,
        job=job,
        measure=measure,
    )


def versions() -> dict[str, str]:
    """Python and the packages that affect a run's numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"torch": torch.__version__}  # with its build, which the metadata may lack


def hardware() -> dict[str, Any]:
    """This process's machine: CPU model, usable cores, and GPUs."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"cpu": _cpu_model(), "cpu_cores": len(os.sched_getaffinity(0)), "gpus": gpus}


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def summarize(
    facts: RunFacts,
    steps: Sequence[dict[str, Any]],
    sample: OptimizerSample,
    *,
    largest_share: float | None,
    low_rank_bytes: int,
    own_steps: int,
    status: str,
    planned_steps: int,
    seconds: float,
    parts: Sequence[dict[str, Any]],
    saves: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The report of a run that is over, whether it finished or not.

    Bytes are per process, by process index, at the end of the run; `largest_share` is the largest
    of any process at any sampled step. The bytes of the low-rank matrices are totals over all
    processes: the most at any sampled step, and what AdamW holds for the same matrices. Of `steps`,
    the last `own_steps` belong to this part of the run; `seconds`, the total training time,
    includes the earlier `parts`. `saves` are the checkpoints that this part wrote.
    """
    evaluated = [numbers for step in steps if (numbers := measured(step))]
    judged = {
        key: [numbers[key] for numbers in evaluated if key in numbers]
        for key in dict.fromkeys((LOSS, facts.measure))
    }
    return {
        "status": status,
        **asdict(facts),
        "steps": steps[-1]["step"] if steps else 0,
        "planned_steps": planned_steps,
        "tokens": steps[-1]["tokens"] if steps else 0,
        "final_loss": steps[-1]["loss"] if steps else None,
        "final_held_out_loss": judged[LOSS][-1] if judged[LOSS] else None,
        "best_held_out_loss": MEASURES[LOSS].best(judged[LOSS]),
        "final_measure": judged[facts.measure][-1] if judged[facts.measure] else None,
        "best_measure": MEASURES[facts.measure].best(judged[facts.measure]),
        "final_measures": evaluated[-1] if evaluated else {},
        "mean_rank": sample.mean_rank,
        "state_bytes": sample.state_bytes,
        "adamw_state_bytes": sample.adamw_bytes,
        "largest_share": largest_share,
        "low_rank_state_bytes": low_rank_bytes,
        "low_rank_adamw_bytes": sample.low_rank_adamw_bytes,
        "seconds_per_step": median(step["seconds"] for step in steps) if steps else None,
        "seconds": seconds,
        "parts": list(parts),
        "saves": list(saves),
        "sent_bytes_per_step": [sent / max(1, own_steps) for sent in sample.sent_bytes],
        "collectives_per_step": sample.collectives / max(1, own_steps),
    }
