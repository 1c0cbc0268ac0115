"""Read a checkpoint: verify it, check it against the model, then load each process's slices."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arg_dist.checkpoint.compatibility import (
    check_model,
    check_plans,
    put_back,
    put_back_settings,
    saved_settings,
    trained_before,
)
from arg_dist.checkpoint.files import describe, on_all, verify
from arg_dist.checkpoint.index import (
    INDEX_NAME,
    CheckpointError,
    Index,
    read_index,
    tensor_key,
)
from arg_dist.checkpoint.random_states import restore_random_states
from arg_dist.checkpoint.scheduling import load_scheduler
from arg_dist.checkpoint.slices import SliceReader
from arg_dist.checkpoint.writing import persistent_buffers, untrained_parameters
from arg_dist.checkpoint.written_parts import held_untrained, local_values
from arg_dist.optimizer import AdaRankGrad
from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.fragment import Box, Fragment, adapters
from arg_dist.sharding.job import job_communicator
from arg_dist.sharding.shard import MatrixShard, Shard
from arg_dist.subspace.state import State, as_scalar, with_scalars


@dataclass(frozen=True)
class Restored:
    """What was restored from a checkpoint.

    Attributes:
        path: folder of the checkpoint.
        step: optimizer steps of the job up to the checkpoint.
        world_size: number of processes that wrote it.
        job: data that the training job passed when saving.
        random_states: whether random number generators were restored, which requires the number of
            processes that wrote the checkpoint.
        passed_over: why each newer checkpoint, which is damaged, was not loaded.
    """

    path: Path
    step: int
    world_size: int
    job: dict[str, Any]
    random_states: bool
    passed_over: list[str] = field(default_factory=list)


def verified_index(checkpoint: Path, communicator: Communicator) -> Index:
    """Verifies all files of a checkpoint and returns its index; a collective.

    Each process verifies a share of the files; the result is the same on all of them.

    Raises:
        CheckpointError: on every process; a file is missing or damaged, and the message names it.
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
                f"{checkpoint}: process {process} finds another checkpoint here than process 0; "
                "checkpoints must be on a file system that all processes share"
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
    """Loads a verified checkpoint; see :func:`arg_dist.checkpoint.load`."""
    job = job_communicator(optimizer.process_group, optimizer.bind())
    on_all(job, lambda: check_model(checkpoint, index, optimizer, weights=weights))
    before = saved_settings(optimizer.param_groups)
    different = put_back_settings(optimizer, index)
    plans = optimizer.bind_all(frozen=trained_before(index, weights=weights), anew=True)
    try:
        on_all(job, lambda: check_plans(checkpoint, index, plans, weights=weights))
    except CheckpointError:
        for group, settings in zip(optimizer.param_groups, before, strict=True):
            put_back(group, settings)
        raise
    if different and job.me == 0:
        warnings.warn(
            f"{checkpoint}: the optimizer continues with the checkpoint's settings: "
            + "; ".join(different),
            stacklevel=7,
        )
    same_processes = index.world_size == job.size and bool(index.random_states)

    def read_own() -> None:
        with SliceReader(checkpoint, index) as reader:
            states: dict[Tensor, dict[str, State]] = {}
            for plan in plans:
                for shard in plan.shards:
                    if shard.name in index.states:
                        state = _state(reader, shard, plan.own[shard.fragment.name])
                        states.setdefault(shard.fragment.target, {})[shard.name] = state
            for unit in (unit for plan in plans for unit in plan.keys_only):
                if unit.name in index.states:  # that it has state is known on every process
                    states.setdefault(unit.fragment.target, {}).setdefault(unit.name, {})
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
        for adapter in adapters():
            adapter.weights_loaded(optimizer)
    if scheduler is not None and index.scheduler is not None:
        load_scheduler(scheduler, index)
    elif (scheduler is not None or index.scheduler is not None) and job.me == 0:
        has, lacks = ("it", "the job") if scheduler is None else ("the job", "it")
        warnings.warn(
            f"{checkpoint}: {has} has the state of a scheduler and {lacks} has none: the learning "
            "rates are not those of an uninterrupted run; pass scheduler= when saving and loading",
            stacklevel=4,
        )
    return Restored(checkpoint, index.step, index.world_size, index.job_values(), same_processes)


def _state(reader: SliceReader, shard: Shard, own: Box) -> State:
    """Reads this process's part of the state of a matrix or tensor, to the weights' device.

    Args:
        reader: of the checkpoint.
        shard: the part.
        own: the elements of its parameter that this process would write.
    """
    entry = reader.index.states[shard.name]
    device = shard.fragment.target.device
    state = with_scalars(entry.numbers, device) | entry.lists
    stored = shard.sharding.stored()
    for part, sliced in entry.tensors.items():
        key, wanted = tensor_key("state", shard.name, part), stored[part][shard.me]
        if isinstance(shard, MatrixShard):
            values = reader.rows(sliced, key, wanted)
        else:
            box = (wanted,) if shard.fragment.box is None else own
            transposed = shard.fragment.transposed
            values = reader.elements(entry, sliced, key, box, transposed=transposed).reshape(-1)
        state[part] = values.to(device)
    low, high = shard.sharding.kept_rows[shard.me]
    for key, terms in entry.sums.items():
        held = sum(value for _, first, value in terms if low <= first < high)
        state[key] = as_scalar(key, held, device)
    return state


def _read_weight(reader: SliceReader, fragment: Fragment) -> None:
    """Copies the stored values of a fragment into the engine's tensor."""
    weight = reader.index.weights[fragment.name]
    values = reader.elements(
        weight,
        weight.elements,
        tensor_key("weight", fragment.name),
        fragment.held,
        transposed=fragment.transposed,
    )
    target = local_values(fragment)
    # what was created in inference mode, as frozen weights may be, changes in that mode alone
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        target.copy_(values.view(target.shape))
