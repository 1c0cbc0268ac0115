"""Trains small models under many DeepSpeed configurations in one launch, against one process.

    PYTHONPATH=. deepspeed --num_gpus 2 tests/launch/zero_runs.py --out FILE --cases llama-zero2 \
        --references FOLDER

Writes what tests assert on: losses, ranks, bytes and collectives of each case. What one process
gives is computed by the first launch that asks for it, and stays in FOLDER for the others.
"""

import argparse
import copy
import faulthandler
import gc
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.patience import patient

faulthandler.dump_traceback_later(patient(340), exit=True)  # a deadlock shows where it stands

import deepspeed  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel(logging.ERROR)

import arg_dist  # noqa: E402
from launchers.pretraining.training import leave_processes  # noqa: E402
from tests.launch import models, training  # noqa: E402
from tests.launch.cases import CASES, Case  # noqa: E402
from tests.launch.engine_ways import describe  # noqa: E402

Disturbance = Callable[[torch.nn.Module], None]


@dataclass
class DeepSpeedTraining:
    """The real engine, which accumulates, clips and steps by its own count."""

    engine: Any
    optimizer: arg_dist.AdaRankGrad

    def micro_step(self, tokens: torch.Tensor, share: float, last: bool) -> torch.Tensor:
        loss = self.engine(input_ids=tokens, labels=tokens).loss
        self.engine.backward(loss)
        self.engine.step()
        return loss


def reference(case: Case, folder: Path) -> dict[str, Any]:
    """The same training in one process, on whole matrices, in fp32; kept in `folder`."""
    kept = folder / f"{case.reference}.pt"
    if kept.exists():
        found: dict[str, Any] = torch.load(kept)
        return found
    alone = training.one_process(case.model, **case.more)
    run = training.train(alone)
    optimizer = alone.optimizer
    result = {
        **run,
        "state_bytes": optimizer.state_bytes(),
        "refreshes": {entry["name"]: entry["refreshes"] for entry in optimizer.stats()},
        "bases": bases(optimizer),
    }
    torch.save(result, kept)
    return result


def bases(optimizer: arg_dist.AdaRankGrad) -> dict[str, torch.Tensor]:
    """This process's rows of every basis."""
    found = {}
    for state in optimizer.state.values():
        for name, entry in state.items():
            if "basis" in entry:
                found[name] = entry["basis"]
    return found


def start(case: Case, config: dict[str, Any], disturb: Disturbance | None = None) -> Any:
    """An engine by one of the three ways in, with other weights than usual if `disturb` is given.

    Args:
        case: model and way in.
        config: DeepSpeed's.
        disturb: changes the model before the engine sees it.
    """
    if case.zero_init:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = models.build(case.model)
        copy_weights(models.build(case.model), model)
    else:
        model = models.build(case.model)
    if disturb is not None:
        disturb(model)
    if case.way == "initialize":
        return arg_dist.initialize(model=model, config=config)[0]
    parameters = [p for p in model.parameters() if p.requires_grad]
    if case.way == "json":
        return deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]
    del config["optimizer"]
    optimizer = arg_dist.AdaRankGrad(arg_dist.param_groups(model), **case.settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config
    )[0]


def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Fills a model that was partitioned while it was made."""
    for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([ours], modifier_rank=0):
            if dist.get_rank() == 0:
                ours.data.copy_(theirs.data)


def train(case: Case, expected: dict[str, Any]) -> dict[str, Any]:
    processes = dist.get_world_size()
    engine = start(case, case.config(models.BATCH // processes // case.accumulation))
    optimizer = engine.basic_optimizer
    calls = []
    inner = optimizer.step

    def counted(*args: Any) -> Any:
        before = optimizer.collectives()
        result = inner(*args)
        calls.append(optimizer.collectives() - before)
        return result

    optimizer.step = counted
    run = training.train(
        DeepSpeedTraining(engine, optimizer), [case.accumulation], group=dist.group.WORLD
    )
    state_bytes = gather(optimizer.state_bytes())
    everyones_bases = gather(bases(optimizer))
    result = {
        "processes": gather({**run, "engine": describe(engine)}),
        "projector_difference": max(
            projector_difference(whole, [b[name] for b in everyones_bases if name in b])
            for name, whole in expected["bases"].items()
        ),
        "state_of_one_process": sum(state_bytes) / expected["state_bytes"],
        "largest_share": max(state_bytes) * processes / sum(state_bytes),
        "most_collectives": max(calls),
        "engine": type(engine.optimizer).__name__,
        "optimizer": type(optimizer).__name__,
        "skipped_steps": engine.skipped_steps,
        "copied": copied(optimizer),
    }
    engine.destroy()
    return result


def copied(optimizer: arg_dist.AdaRankGrad) -> str:
    """How a copy of the optimizer is refused; empty if it is not."""
    try:
        copy.deepcopy(optimizer)
    except RuntimeError as error:
        return str(error)
    return ""


def projector_difference(whole: torch.Tensor, parts: list[torch.Tensor]) -> float:
    """Largest entry of ``Q Q^T - Q_ref Q_ref^T``; columns of a basis have no sign."""
    together = torch.cat(parts)
    if together.shape != whole.shape:
        return float("inf")
    return (together @ together.T - whole @ whole.T).abs().max().item()


def gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", required=True)
    parser.add_argument("--references", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # or the collections that DeepSpeed asks for would go through every module
    chosen = [CASES[name] for name in options.cases]
    deepspeed.init_distributed()
    references = {case.reference: case for case in chosen}
    mine = sorted(references)[dist.get_rank() :: dist.get_world_size()]
    computed = gather({name: reference(references[name], options.references) for name in mine})
    expected = {name: run for part in computed for name, run in part.items()}
    results: dict[str, Any] = {}
    for case in chosen:
        with case.environment():
            results[case.name] = train(case, expected[case.reference])
        dist.barrier()
    if dist.get_rank() == 0:
        for name, run in expected.items():
            first, last = run["ranks"][0], run["ranks"][-1]
            results[f"reference-{name}"] = {
                "losses": run["losses"],
                "ranks": run["ranks"],
                "sizes": run["sizes"],
                "refreshes": min(run["refreshes"].values()),
                "rank_changed": any(first[key] != last[key] for key in first),
            }
        options.out.write_text(json.dumps(results, indent=1))
    leave_processes()


if __name__ == "__main__":
    main()
