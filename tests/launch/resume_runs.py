"""Saves under DeepSpeed in mid-run, loads into engines that have other weights, and goes on.

    PYTHONPATH=. deepspeed --num_gpus 2 tests/launch/resume_runs.py --out NEW --moved WRITTEN

With its own checkpoints and with ours; and goes on from what `moved_runs.py` has written.
"""

import argparse
import faulthandler
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launchers.pretraining.training import leave_processes
from tests.launch.cases import CASES, MOVED, RESUMED, Case
from tests.launch.zero_jobs import SAVED_AFTER, Job, other_trained_weights, other_weights
from tests.launch.zero_runs import deepspeed, gather
from tests.patience import patient

faulthandler.dump_traceback_later(patient(170), exit=True)

STEPS = SAVED_AFTER + 5


def resume(case: Case, directory: Path) -> dict[str, Any]:
    """One run that goes on, and what its checkpoints give in another engine."""
    job = Job(case)
    job.save(directory / "start")
    runs = {"first": job.train(0, 2)}
    job.train(2, SAVED_AFTER)
    job.engine.save_checkpoint(str(directory), tag="middle", client_state={"mine": 5})
    job.save(directory / "ours", SAVED_AFTER)
    runs["uninterrupted"] = {**job.train(SAVED_AFTER, STEPS), "weights": job.weights()}
    job.engine.destroy()

    job = Job(case, other_weights)
    job.load(directory / "start")
    runs["started anew"] = job.train(0, 2)
    _, client_state = job.engine.load_checkpoint(str(directory), tag="middle")
    assert client_state["mine"] == 5
    assert not [key for key in client_state if "adarankgrad" in key]
    save_at_once(job, directory)
    runs["by DeepSpeed"] = {**job.train(SAVED_AFTER, STEPS), "weights": job.weights()}
    assert job.load(directory / "ours").step == SAVED_AFTER
    runs["by ours"] = {**job.train(SAVED_AFTER, STEPS), "weights": job.weights()}
    job.engine.load_checkpoint(str(directory), tag="again")
    runs["by DeepSpeed, again"] = {**job.train(SAVED_AFTER, STEPS), "weights": job.weights()}
    job.load(directory / "ours again")
    runs["by ours, again"] = {**job.train(SAVED_AFTER, STEPS), "weights": job.weights()}
    job.engine.destroy()
    return runs


def save_at_once(job: Job, directory: Path) -> None:
    """Saves by both ways what was just loaded, while half of the layers rest."""
    resting = [p for p in job.engine.module.parameters() if p.requires_grad][::2]
    for parameter in resting:
        parameter.requires_grad_(False)
    job.engine.save_checkpoint(str(directory), tag="again")
    job.save(directory / "ours again", SAVED_AFTER)
    for parameter in resting:
        parameter.requires_grad_(True)


def go_on(case: Case, directory: Path) -> dict[str, Any]:
    """Goes on from DeepSpeed's checkpoint of more processes."""
    universal = {} if case.stage == 0 else {"checkpoint": {"load_universal": True}}
    job = Job(case, other_trained_weights, **universal)
    if case.stage in (1, 2):
        job.engine.load_checkpoint(str(directory), load_optimizer_states=False)
        assert job.optimizer.state_bytes() == 0
    path, _ = job.engine.load_checkpoint(str(directory))
    assert path is not None
    run = job.train(SAVED_AFTER, SAVED_AFTER + 20)
    job.engine.destroy()
    return run


def change_stage(case: Case, checkpoint: Path) -> dict[str, Any]:
    """Goes on from our checkpoint, which was written at another stage by more processes."""
    job = Job(case, other_weights)
    assert job.load(checkpoint).world_size == 4
    run = job.train(SAVED_AFTER, SAVED_AFTER + 20)
    job.engine.destroy()
    return run


def refusal(case: Case, directory: Path) -> list[str]:
    """What DeepSpeed says to a checkpoint of more processes that was not converted."""
    job = Job(case)
    try:
        job.engine.load_checkpoint(str(directory), tag="t")
    except Exception as error:
        return [str(error), *getattr(error, "__notes__", [])]
    finally:
        job.engine.destroy()
    return []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--moved", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    results: dict[str, Any] = {"resumed": {}, "moved": {}}
    for name in RESUMED:
        results["resumed"][name] = gather(resume(CASES[name], options.out / name))
    for name in MOVED:
        results["moved"][name] = gather(go_on(CASES[name], options.moved / name))
    ours = change_stage(CASES["llama-zero3"], options.moved / "llama-zero2" / "ours")
    results["other stage"] = gather(ours)
    mesh = change_stage(CASES["llama-zero3"], options.moved / "mesh")
    results["from a mesh"] = gather(mesh)
    unconverted = options.moved.parent / "written" / "odd-zero1-groups"
    results["refusal"] = refusal(CASES["odd-zero1-groups"], unconverted)
    if dist.get_rank() == 0:
        (options.out / "results.json").write_text(json.dumps(results))
    dist.barrier()
    leave_processes()


if __name__ == "__main__":
    main()
