"""Saves by accelerate's ``save_state`` in mid-run, loads into a fresh training, and goes on.

PYTHONPATH=. torchrun --nproc_per_node 2 tests/launch/save_state_runs.py --out DIRECTORY
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.patience import patient

faulthandler.dump_traceback_later(patient(100), exit=True)

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from accelerate.utils import InitProcessGroupKwargs  # noqa: E402

from tests.launch import accelerate_engines as engines  # noqa: E402
from tests.launch import models  # noqa: E402
from tests.launch.training import optimizer_of, ranks_now  # noqa: E402

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


class Pair:
    """Two models with an optimizer each in one accelerator, prepared by accelerate's own methods.

    Accumulates gradients over two batches; under DDP with a GradScaler, and with a third optimizer
    that is only registered for checkpoints.
    """

    def __init__(self, engine: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        options: dict[str, Any] = {
            "gradient_accumulation_steps": 2,
            "kwargs_handlers": [InitProcessGroupKwargs(backend="gloo")],
        }
        built = [models.build("llama"), models.build("llama")]
        self.optimizers = [optimizer_of(model) for model in built]
        self.alone: torch.nn.Module | None = None
        if engine == "ddp":
            self.accelerator = Accelerator(cpu=True, **options)
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            self.models = [self.accelerator.prepare_model(model) for model in built]
            self.prepared = [self.accelerator.prepare_optimizer(each) for each in self.optimizers]
            self.alone = models.build("llama")
            self.optimizers.append(optimizer_of(self.alone))
            self.accelerator.register_for_checkpointing(self.optimizers[-1])
        else:
            with engines.cpus_as_gpus():
                self.accelerator = Accelerator(**options, **engines.fsdp2_plugin())
            both = [*zip(built, self.optimizers, strict=True)]
            done = [self.accelerator.prepare(model, optimizer) for model, optimizer in both]
            self.models, self.prepared = [list(each) for each in zip(*done, strict=True)]

    def train(self, first: int, last: int) -> list[float]:
        share, losses = models.BATCH // dist.get_world_size() // 2, []
        for step in range(first, last):
            own = models.batch(step)[dist.get_rank() * 2 * share :][: 2 * share]
            for part in own.split(share):
                with self.accelerator.accumulate(*self.models):
                    losses += [self.micro_step(i, (part + i) % models.VOCABULARY) for i in (0, 1)]
            if self.alone is not None:
                losses.append(self.step_alone(self.alone, own))
        return losses

    def micro_step(self, i: int, tokens: torch.Tensor) -> float:
        loss = self.models[i](input_ids=tokens, labels=tokens).loss
        self.accelerator.backward(loss)
        self.prepared[i].step()
        self.prepared[i].zero_grad()
        return loss.item()

    def step_alone(self, model: torch.nn.Module, tokens: torch.Tensor) -> float:
        """A step of the third optimizer, whose gradients the loop averages itself."""
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        self.optimizers[-1].step()
        self.optimizers[-1].zero_grad()
        return loss.item()


def resume_pair(engine: str, folder: Path) -> dict[str, Any]:
    first = Pair(engine)
    first.train(0, SAVED_AFTER)
    first.accelerator.save_state(str(folder))
    weights = copy.deepcopy(first.alone.state_dict()) if first.alone is not None else {}
    uninterrupted = first.train(SAVED_AFTER, STEPS)
    second = Pair(engine)
    second.accelerator.load_state(str(folder))
    if second.alone is not None:
        second.alone.load_state_dict(weights)
    continued = second.train(SAVED_AFTER, STEPS)
    ranks = [[ranks_now(each) for each in pair.optimizers] for pair in (first, second)]
    return {
        "engine": second.accelerator.distributed_type.value,
        "uninterrupted": uninterrupted,
        "continued": continued,
        "ranks_equal": ranks[0] == ranks[1],
        "on": first.train(STEPS, STEPS + 2),
        "on_again": prepared_again(second) if engine == "ddp" else second.train(STEPS, STEPS + 2),
    }


def prepared_again(pair: Pair) -> list[float]:
    """Losses of two more steps, with the optimizers prepared again by an emptied accelerator."""
    pair.accelerator.free_memory()
    pair.prepared = [pair.accelerator.prepare_optimizer(each) for each in pair.optimizers[:2]]
    return pair.train(STEPS, STEPS + 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for engine in ("ddp", "fsdp2"):
        results[engine] = resume(engine, options.out / engine)
        results[f"{engine}-pair"] = resume_pair(engine, options.out / f"{engine}-pair")
    (options.out / f"process{dist.get_rank()}.json").write_text(json.dumps(results, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
