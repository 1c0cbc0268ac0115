"""Saves under DeepSpeed what fewer processes are going to load, and trains on to compare.

PYTHONPATH=. deepspeed --num_gpus 4 tests/launch/moved_runs.py --out DIRECTORY
"""

import argparse
import contextlib
import faulthandler
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal

import arg_dist
from launchers.pretraining.training import leave_processes
from tests.launch import mesh_engines, training
from tests.launch.cases import CASES, MOVED, Case
from tests.launch.zero_jobs import SAVED_AFTER, Job
from tests.launch.zero_runs import deepspeed, gather
from tests.patience import patient

faulthandler.dump_traceback_later(patient(170), exit=True)

STATE = "adarankgrad"


def save(case: Case, out: Path) -> dict[str, Any]:
    job = Job(case)
    directory = out / case.name
    job.engine.save_checkpoint(str(directory), tag="t")
    job.train(0, SAVED_AFTER)
    job.engine.save_checkpoint(str(directory), tag="t")  # in the place of the first one
    job.save(directory / "ours", SAVED_AFTER)
    state_bytes = job.optimizer.state_bytes()
    run = job.train(SAVED_AFTER, SAVED_AFTER + 20)
    result = {
        **run,
        "saved_bytes": sum(file.stat().st_size for file in (directory / "t").glob("*_optim_*.pt")),
        "trained_elements": sum(gather(job.optimizer.held_elements())),
        "state_bytes": sum(gather(state_bytes)),
    }
    job.engine.destroy()
    return result


def save_of_a_mesh(folder: Path) -> dict[str, Any]:
    """A run of FSDP2 over tensor parallelism, in the middle of which it is saved."""
    job, group = mesh_engines.start(dist.group.WORLD, "llama", (2, 2), clips=True)
    train = partial(training.train, job, group=group, place=job.place)
    train(steps=range(SAVED_AFTER))
    arg_dist.checkpoint.save(folder, job.optimizer, model=job.model, step=SAVED_AFTER)
    return train(steps=range(SAVED_AFTER, SAVED_AFTER + 20))


def convert(source: Path, target: Path) -> None:
    """What ``python -m deepspeed.checkpoint.ds_to_universal`` does."""
    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)


def convert_all(out: Path, moved: Path) -> None:
    """Converts, and moves the results about: the state must be found in each of three places."""
    for name in MOVED:
        source, directory = out / name / "t", moved / name
        match CASES[name].stage:
            case 0:
                directory.symlink_to(out / name)
            case 1:  # in the converted checkpoint, by somebody's hand
                convert(source, directory / "t_uni")
                (source / STATE).rename(directory / "t_uni" / STATE)
            case 2:  # where it was written
                convert(source, directory / "t_uni")
            case 3:  # beside the converted checkpoint, both moved
                convert(source, out / name / "t_uni")
                (out / name).rename(directory)
    (moved / "llama-zero2" / "ours").symlink_to(out / "llama-zero2" / "ours")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    results = {name: gather(save(CASES[name], options.out / "written")) for name in MOVED}
    results["mesh"] = gather(save_of_a_mesh(options.out / "moved" / "mesh"))
    if dist.get_rank() == 0:
        convert_all(options.out / "written", options.out / "moved")
        (options.out / "results.json").write_text(json.dumps(results))
    dist.barrier()
    leave_processes()


if __name__ == "__main__":
    main()
