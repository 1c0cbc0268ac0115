"""What lies in memory at the optimizer's steps, and what they send: for runs that were planned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

import arg_dist
from arg_dist.planning.llama import model_config
from arg_dist.sharding.shard import local_part
from benchmarks.measuring.allocations import allocations
from launchers.pretraining.models import build_model
from tests.launch.planned_cases import Case

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


def model_of(case: Case, deepspeed_config: dict[str, Any] | None = None) -> nn.Module:
    """The model to train, in its type unless DeepSpeed converts it."""
    shape = model_config(case.model, vocab_size=case.vocabulary, length=TOKENS)
    model = build_model(case.model, shape, seed=0, deepspeed_config=deepspeed_config or {})
    converts = case.dtype == "bf16" and not case.engine.startswith("zero")
    return model.to(torch.bfloat16) if converts else model


def taken(case: Case, probe: Probe, train: Callable[[torch.Tensor], None]) -> dict[str, Any]:
    """What the first step took on this process, and the second; of nano, temporaries, too.

    These are of `WATCHED` steps each, as messages may be freed a moment later by a thread that
    sends them: without a refresh, and with new bases everywhere.

    Args:
        case: what is trained.
        probe: looks at its steps.
        train: takes a step on tokens, ``1 x TOKENS``.
    """
    # DeepSpeed takes a step in its constructor at stage 0 in bf16, with zero gradients
    sent, collectives = [probe.optimizer.comm_bytes()], [probe.optimizer.collectives()]
    sizes = []
    probes = case.has_temporaries
    for step in range(1 + 2 * WATCHED if probes else 2):
        probe.watched = probes  # always: what was allocated unseen, is freed unseen
        if step > WATCHED:
            refresh_all(probe.optimizer)
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        train(torch.randint(case.vocabulary, (1, TOKENS), generator=generator))
        sent.append(probe.optimizer.comm_bytes())
        collectives.append(probe.optimizer.collectives())
        sizes.append(probe.optimizer.state_bytes())
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


def taken_in_torch(case: Case, model: nn.Module, group: Any) -> dict[str, Any]:
    """:func:`taken` of a model that one of PyTorch's engines has, or none.

    Args:
        case: what is trained.
        model: the model, handed to the engine.
        group: `process_group` of the optimizer.
    """
    groups = arg_dist.param_groups(model)
    optimizer = arg_dist.AdaRankGrad(groups, process_group=group, **case.settings)
    probe = Probe(model, optimizer)

    def train(tokens: torch.Tensor) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return taken(case, probe, train)
