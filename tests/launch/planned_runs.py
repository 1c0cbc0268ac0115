"""Trains a few steps under many engines in one launch, and tells what they took.

    PYTHONPATH=. torchrun --nproc_per_node 2 tests/launch/planned_runs.py --out FILE

Writes, for each case and process, bytes of tensors at the optimizer's step and bytes that it sent.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

faulthandler.dump_traceback_later(340, exit=True)  # a deadlock shows where it stands

import deepspeed  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

import arg_dist  # noqa: E402
from arg_dist.planning.llama import model_config  # noqa: E402
from arg_dist.sharding.shard import local_part  # noqa: E402
from benchmarks.measuring.allocations import allocations  # noqa: E402
from launchers.pretraining.models import build_model  # noqa: E402
from launchers.pretraining.training import leave_processes  # noqa: E402
from tests.launch.planned_cases import BUCKET, CASES, Case  # noqa: E402
from tests.launch.torch_engines import ddp, fsdp2  # noqa: E402

WATCHED = 2
"""Steps of each kind of which the temporaries are taken."""
TOKENS = 160
"""Of a process in a step: more than the largest rank, so that gradients have it."""


@dataclass
class Probe:
    """Looks at what lies in memory whenever the optimizer steps.

    Attributes:
        model: what is trained.
        optimizer: what trains it.
        seen: what each call of ``step()`` found.
        watched: whether the next calls tell what they allocate.
        temporaries: the most that each of those had allocated.
    """

    model: nn.Module
    optimizer: arg_dist.AdaRankGrad
    seen: list[dict[str, int]] = field(default_factory=list)
    watched: bool = False
    temporaries: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        inner = self.optimizer.step

        def step(*arguments: Any) -> Any:
            self.look()
            if not self.watched:
                return inner(*arguments)
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
                result = inner(*arguments)
            self.temporaries.append(most_allocated(watch))
            return result

        self.optimizer.step = step  # type: ignore[method-assign]

    def look(self) -> None:
        """Bytes of weights, of the engine's own weights, and of gradients."""
        parameters = list(self.model.parameters())
        targets = [t for group in self.optimizer.param_groups for t in group["params"]]
        weights = storages(getattr(p, "ds_tensor", p) for p in parameters)
        masters = storages(targets)
        gradients = storages(t.grad for t in (*targets, *parameters) if t.grad is not None)
        zero3 = getattr(parameters[0], "_z3_optimizer", None)
        backward = self.optimizer._backward
        gradients |= storages([] if backward is None else backward.tensors())
        if zero3 is not None:
            masters |= storages(zero3.fp32_partitioned_groups_flat)
            gradients |= storages([zero3.grad_partitions_flat_buffer])
        found = {
            "weights": weights,
            "master_weights": {k: v for k, v in masters.items() if k not in weights},
            "gradients": gradients,
        }
        self.seen.append({key: sum(each.values()) for key, each in found.items()})


def most_allocated(watch: profile) -> int:
    """The most bytes that were allocated and not yet freed in what was watched."""
    return max(accumulate(change for _, change in allocations(watch)), default=0)


def refresh_all(optimizer: arg_dist.AdaRankGrad) -> None:
    """Lets the next step look for all bases anew."""
    for units in optimizer.state.values():
        for state in units.values():
            state.update({"gap": 0} if "gap" in state else {})


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of the storages that tensors lie in on this process, by where they begin."""
    parts = (local_part(tensor).detach().untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in parts}


def run(case: Case) -> dict[str, Any]:
    """What the first step took on this process, and the second; of nano, temporaries, too.

    These are of `WATCHED` steps each, as messages may be freed a moment later by a thread that
    sends them: without a refresh, and with new bases everywhere.
    """
    config: dict[str, Any] = {
        "train_batch_size": dist.get_world_size(),
        "optimizer": {"type": "AdaRankGrad", "params": case.settings},
        "zero_optimization": {
            "stage": int(case.engine[-1]) if case.engine.startswith("zero") else 0,
            "reduce_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
        },
        "bf16": {"enabled": case.dtype == "bf16"},
    }
    shape = model_config(case.model, vocab_size=case.vocabulary, length=TOKENS)
    model: Any = build_model(case.model, shape, seed=0, deepspeed_config=config)
    engine = None
    if case.engine.startswith("zero"):
        engine = arg_dist.initialize(model=model, config=config)[0]
        probe = Probe(model, engine.basic_optimizer)
    else:
        model = model.to(torch.bfloat16) if case.dtype == "bf16" else model
        if case.engine != "none":
            model = {"ddp": ddp, "fsdp2": fsdp2}[case.engine]()(model, dist.group.WORLD)
        if case.engine == "ddp" and case.settings.get("gradient_sync") == "sketch":
            arg_dist.sketch_only(model)
        optimizer = arg_dist.AdaRankGrad(
            arg_dist.param_groups(model),
            process_group=None if case.engine == "none" else "world",
            **case.settings,
        )
        probe = Probe(model, optimizer)
    # DeepSpeed takes a step in its constructor at stage 0 in bf16, with zero gradients
    sent, collectives = [probe.optimizer.comm_bytes()], [probe.optimizer.collectives()]
    sizes = []
    probes = case.has_temporaries
    for step in range(1 + 2 * WATCHED if probes else 2):
        probe.watched = probes  # always: what was allocated unseen, is freed unseen
        if step > WATCHED:
            refresh_all(probe.optimizer)
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        tokens = torch.randint(case.vocabulary, (1, TOKENS), generator=generator)
        loss = (engine or model)(input_ids=tokens, labels=tokens).loss
        if engine is not None:
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            probe.optimizer.step()
            probe.optimizer.zero_grad()
        sent.append(probe.optimizer.comm_bytes())
        collectives.append(probe.optimizer.collectives())
        sizes.append(probe.optimizer.state_bytes())
    if engine is not None:
        engine.destroy()
    return {
        **probe.seen[1],
        "optimizer_state": sizes[1],
        "step_temporaries": probe.temporaries[1 : 1 + WATCHED],
        "refresh_temporaries": probe.temporaries[1 + WATCHED :],
        "sent_in_first_step": sent[1] - sent[0],
        "sent_per_step": sent[2] - sent[1],
        "collectives_in_first_step": collectives[1] - collectives[0],
        "collectives_per_step": collectives[2] - collectives[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # or the collections that DeepSpeed asks for would go through every module
    deepspeed.init_distributed("gloo", verbose=False)
    results = {}
    for case in CASES:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, run(case))
        results[case.name] = everyone
        gc.collect()
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps(results, indent=1))
    leave_processes()


if __name__ == "__main__":
    main()
