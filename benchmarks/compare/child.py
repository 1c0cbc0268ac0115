"""The process of one run: ``python -m benchmarks.compare.child TRIAL.json RESULT.json``.

TRIAL.json has the keys ``kind``, ``job``, ``method``, ``lr``, ``rest_lr``, ``seed``, ``data``,
``kept`` (file from which an interrupted run goes on) and ``parent`` (id of the process that waits
for the result; this process exits when it does).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare.methods import Method
from benchmarks.compare.pretraining import PretrainingJob, pretrain
from launchers.pretraining.environment import prepare_environment
from launchers.reporting.files import write_json
from launchers.reporting.summary import hardware


def main(trial_path: str, result_path: str) -> int:
    """Run the trial at `trial_path` and write its results as JSON to `result_path`."""
    trial = json.loads(Path(trial_path).read_text())
    threading.Thread(target=_end_with, args=(trial["parent"],), daemon=True).start()
    prepare_environment(world_of_one=False)
    torch.set_num_threads(1)
    began = time.perf_counter()
    results = run(trial)
    seconds = results.pop("earlier_seconds", 0.0) + time.perf_counter() - began
    results |= {"total_seconds": seconds, "hardware": hardware()}
    write_json(Path(result_path), results)
    return 0


def run(trial: dict[str, Any]) -> dict[str, Any]:
    """Run `trial` and return its results."""
    method = Method(**trial["method"])
    show = partial(print, flush=True)
    own = {"lr": trial["lr"], "rest_lr": trial["rest_lr"], "seed": trial["seed"]}
    if trial["kind"] == "pretrain":
        job = PretrainingJob(**trial["job"])
        tokens = Path(trial["data"])
        kept = Path(trial["kept"])
        return pretrain(job, method, **own, tokens=tokens, show=show, kept=kept)
    from benchmarks.compare.finetuning import finetune  # transformers' Trainer is slow to import
    from benchmarks.compare.finetuning_setup import FinetuningJob

    return finetune(FinetuningJob(**trial["job"]), method, **own, show=show)


def _end_with(parent: int) -> None:
    """Exit once `parent` no longer exists, since nothing would read the result."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
