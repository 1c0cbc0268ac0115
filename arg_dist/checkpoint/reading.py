"""Reading: a checkpoint is verified and compared with the model, then each takes its slices."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arg_dist.algorithm import ALIKE, State
from arg_dist.checkpoint.contents import held_untrained, local_values
from arg_dist.checkpoint.files import describe, on_all, verify
from arg_dist.checkpoint.fitting import check_model, check_plans, put_back_settings, saved_settings
from arg_dist.checkpoint.index import (
    INDEX_NAME,
    CheckpointError,
    Index,
    read_index,
    tensor_key,
)
from arg_dist.checkpoint.random_states import restore_random_states
from arg_dist.checkpoint.slices import SliceReader
from arg_dist.checkpoint.writing import persistent_buffers, untrained_parameters
from arg_dist.optimizer import AdaRankGrad
from arg_dist.saved_forms import stored_rows
from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.fragment import ADAPTERS, Fragment
from arg_dist.sharding.job import job_communicator
from arg_dist.sharding.shard import MatrixShard, Shard, TensorShard


@dataclass(frozen=True)
class Restored:
    """What a checkpoint has brought back.

    Attributes:
        path: its folder.
        step: optimizer steps of the job up to it.
        world_size: number of processes that wrote it.
        job: what the training job had given.
        random_states: whether random number generators go on where they were, which they can with
            as many processes as there were.
        passed_over: newer checkpoints that are broken, each with the reason.
    """

    path: Path
    step: int
    world_size: int
    job: dict[str, Any]
    random_states: bool
    passed_over: list[str] = field(default_factory=list)


def verified_index(checkpoint: Path, communicator: Communicator) -> Index:
    """The index of a checkpoint whose files are all as they were written.

    Each process reads its share of the files; they decide together.

    Raises:
        CheckpointError: on every process; names the file.
    """
    read: list[Index] = []

    def read_and_verify() -> str:
        index = read_index(checkpoint)
        names = list(index.files)
        for name in names[communicator.me :: communicator.size]:
            verify(checkpoint / name, index.files[name])
        read.append(index)
        return describe(checkpoint / INDEX_NAME).sha256

    digests = on_all(communicator, read_and_verify)
    for process, digest in enumerate(digests):
        if digest != digests[0]:
            raise CheckpointError(
                f"{checkpoint}: process {process} finds another checkpoint there than process 0; "
                "checkpoints must lie on a file system that all processes share"
            )
    return read[0]


def restore(
    checkpoint: Path,
    index: Index,
    optimizer: AdaRankGrad,
    *,
    model: nn.Module | None,
    scheduler: Any,
    weights: bool,
) -> Restored:
    """Brings back what a verified checkpoint holds; see :func:`arg_dist.checkpoint.load`."""
    job = job_communicator(optimizer.process_group, optimizer.bind())
    on_all(job, lambda: check_model(checkpoint, index, optimizer, weights=weights))
    before = saved_settings(optimizer.param_groups)
    different = put_back_settings(optimizer, index)
    plans = optimizer.bind(anew=True)
    try:
        on_all(job, lambda: check_plans(checkpoint, index, plans, weights=weights))
    except CheckpointError:
        for group, settings in zip(optimizer.param_groups, before, strict=True):
            group.update(settings)
        raise
    if different and job.me == 0:
        warnings.warn(
            f"{checkpoint}: the optimizer goes on with the checkpoint's settings: "
            + "; ".join(different),
            stacklevel=4,
        )
    same_processes = index.world_size == job.size and bool(index.random_states)

    def read_own() -> None:
        with SliceReader(checkpoint, index) as reader:
            states: dict[Tensor, dict[str, State]] = {}
            for shard in (shard for plan in plans for shard in plan.shards):
                if shard.name in index.states:
                    state = _state(reader, shard)
                    states.setdefault(shard.fragment.target, {})[shard.name] = state
            optimizer.replace_state(states, index.calls, index.skipped_steps)
            if weights:
                held = [fragment for plan in plans for fragment in plan.held]
                if model is not None:
                    rest = [*untrained_parameters(optimizer, model, plans)]
                    rest += persistent_buffers(model)
                    for name, tensor in rest:
                        if name in index.weights:
                            held += held_untrained(name, tensor).fragments
                for fragment in held:
                    _read_weight(reader, fragment)
            if same_processes:
                restore_random_states(reader.random_states(job.me))

    on_all(job, read_own)
    if weights:
        for adapter in ADAPTERS:
            adapter.weights_loaded(optimizer)
    if scheduler is not None and index.scheduler is not None:
        scheduler.load_state_dict(index.scheduler)
    return Restored(checkpoint, index.step, index.world_size, index.job, same_processes)


def _state(reader: SliceReader, shard: Shard) -> State:
    """This process's part of the state of a matrix or tensor, on the device of its weights."""
    entry = reader.index.states[shard.name]
    device = shard.fragment.target.device
    state: State = {**entry.numbers, **entry.lists}
    for part, sliced in entry.tensors.items():
        key = tensor_key("state", shard.name, part)
        wanted = stored_rows(shard, part)
        if isinstance(shard, TensorShard):
            transposed = shard.fragment.transposed
            values = reader.elements(entry, sliced, key, wanted, transposed=transposed)
        else:
            values = reader.rows(sliced, key, wanted)
        state[part] = values.to(device)
    if isinstance(shard, MatrixShard):
        low, high = shard.spread.moment.keep[shard.me]
        own = [value for _, first, value in entry.kept_sq if low <= first < high]
        state["kept_sq"] = torch.tensor(sum(own), dtype=torch.float64, device=device)
        for key in state.keys() & set(ALIKE):
            state[key] = torch.tensor(state[key], dtype=torch.float64, device=device)
    return state


def _read_weight(reader: SliceReader, fragment: Fragment) -> None:
    """Puts the stored values of a fragment where the engine keeps them."""
    weight = reader.index.weights[fragment.name]
    values = reader.elements(
        weight,
        weight.elements,
        tensor_key("weight", fragment.name),
        (fragment.start, fragment.stop),
        transposed=fragment.transposed,
    )
    target = local_values(fragment)
    with torch.no_grad():
        target.copy_(values.view(target.shape))
