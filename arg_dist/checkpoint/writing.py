"""Write a checkpoint: each process writes what it owns, and the last step renames the folder."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arg_dist.checkpoint.files import (
    cannot_write,
    on_all,
    sync_folder,
    write_bytes,
    write_tensors,
)
from arg_dist.checkpoint.index import (
    INDEX_NAME,
    CheckpointError,
    Group,
    Index,
    StateEntry,
    Weight,
    file_name,
    index_bytes,
    tensor_key,
)
from arg_dist.checkpoint.random_states import random_states
from arg_dist.checkpoint.scheduling import scheduler_state
from arg_dist.checkpoint.values import UnstorableError, encode
from arg_dist.checkpoint.written_parts import (
    Contents,
    add_states,
    add_trained_weights,
    add_untrained_weights,
    dtype_name,
)
from arg_dist.library_internals import UNSAVED_BUFFERS
from arg_dist.model_groups import named_parameters, own_name, unwrapped
from arg_dist.optimizer import AdaRankGrad
from arg_dist.parameter_groups import settings_of
from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.job import has_first_process, job_communicator, ranks_of
from arg_dist.sharding.plan import Plan


@dataclass(frozen=True)
class Draft:
    """What one process will write, in host memory.

    Attributes:
        index: index of this process's slices only.
        tensors: the slices, by their names in the file.
    """

    index: Index
    tensors: Mapping[str, Tensor]


def draft(
    optimizer: AdaRankGrad,
    *,
    model: nn.Module | None,
    scheduler: Any,
    step: int,
    job: Mapping[str, Any] | None,
    weights: bool,
) -> Draft:
    """Copies what this process will write, so that training can continue meanwhile.

    Raises:
        CheckpointError: on every process: something in the scheduler's state or in `job` cannot
            be stored, or a process could not copy its part.
    """
    plans = optimizer.plans_of_state()
    communicator = job_communicator(optimizer.process_group, plans)
    me = communicator.me
    made: list[Draft] = []

    def make() -> None:
        free = _free_form(scheduler, job)
        optimizer.check_own_state(plans)
        contents = Contents()
        for plan in plans:
            # other replicas hold the same
            if has_first_process(ranks_of(plan.communicator.group), communicator):
                states = ((shard, optimizer.state_of(shard)) for shard in plan.shards)
                add_states(contents, plan, states, me)
                if weights:
                    add_trained_weights(contents, plan, me)
        if model is not None and weights:
            frozen = untrained_parameters(optimizer, model, plans)
            add_untrained_weights(contents, frozen, persistent_buffers(model), communicator)
        generators = random_states()
        on_host = contents.on_host().tensors
        for name, state in generators.items():
            on_host[tensor_key("random", name)] = state
        index = Index(
            step=step,
            world_size=communicator.size,
            calls=optimizer.calls,
            skipped_steps=optimizer.skipped_steps,
            groups=[_describe(group) for group in optimizer.param_groups],
            states=contents.states,
            weights=contents.weights,
            random_states=list(generators),
            **free,
            model_config_values=None if model is None or me != 0 else _config_values(model),
            files={},
        )
        made.append(Draft(index, on_host))

    on_all(communicator, make)
    return made[0]


def write(draft: Draft, directory: Path, communicator: Communicator) -> None:
    """Writes the drafts of all processes to a new folder, which appears once it is complete.

    Args:
        draft: this process's draft.
        directory: the folder, which must not exist.
        communicator: the processes.

    Raises:
        CheckpointError: on every process; what was written is removed.
    """
    me, size = communicator.me, communicator.size
    partial = directory.with_name(f".{directory.name}.partial")
    name = file_name(me, size)
    try:
        on_all(communicator, lambda: _make(partial, directory) if me == 0 else None)
        files = on_all(communicator, lambda: write_tensors(_within(partial) / name, draft.tensors))
        own = (draft.index.states, draft.index.weights)
        parts = communicator.gather_objects_on_first(own, "saving a checkpoint")

        def finish() -> None:
            index = draft.index.model_copy(
                update={
                    "states": _merge(states for states, _ in parts),
                    "weights": _merge(weights for _, weights in parts),
                    "files": {file_name(i, size): entry for i, entry in enumerate(files)},
                }
            )
            write_bytes(partial / INDEX_NAME, index_bytes(index, f"arg_dist {version('arg-dist')}"))
            try:
                sync_folder(partial)
                partial.rename(directory)
                sync_folder(directory.parent)
            except OSError as error:
                raise cannot_write(directory, error) from None

        on_all(communicator, lambda: finish() if me == 0 else None)
    except Exception:
        if me == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def untrained_parameters(
    optimizer: AdaRankGrad, model: nn.Module, plans: Iterable[Plan]
) -> Iterator[tuple[str, Tensor]]:
    """Yields the model's parameters that the optimizer does not train, with their names."""
    trained = {fragment.name for plan in plans for fragment in plan.held}
    names = optimizer.parameter_names()
    for name, parameter in named_parameters(model):
        if names.get(id(parameter), name) not in trained:
            yield name, parameter


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the model's persistent buffers, with their names."""
    for prefix, module in unwrapped(model).named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in UNSAVED_BUFFERS.of(module):
                yield own_name(f"{prefix}.{name}" if prefix else name), buffer


def _config_values(model: nn.Module) -> dict[str, Any] | None:
    """Returns the model's configuration, with the class of its code rather than an engine's."""
    own = unwrapped(model)
    config: Any = getattr(own, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    # engines create classes at run time, and the configuration may name the class of the model
    # from which these weights were initialized
    classes = (each for each in type(own).__mro__ if issubclass(each, nn.Module))
    name = next(
        each.__name__
        for each in classes
        if getattr(sys.modules.get(each.__module__), each.__name__, None) is each
    )
    try:
        values = json.loads(json.dumps(config.to_dict(), default=_as_json))
    except (TypeError, ValueError) as error:
        warnings.warn(
            f"model.config: cannot be written as JSON ({error}): the checkpoint contains no model "
            "configuration, and cannot be exported; use numbers, text, lists and dictionaries",
            stacklevel=2,
        )
        return None
    return {**values, "architectures": [name]}


def _as_json(value: Any) -> Any:
    """What a configuration stores of a value that JSON does not know, as transformers does."""
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if isinstance(value, (Path, torch.device)):
        return str(value)
    for read in ("tolist", "to_dict"):
        if callable(getattr(value, read, None)):
            return getattr(value, read)()
    raise TypeError(f"a {type(value).__name__} is in it")


def _describe(group: Mapping[str, Any]) -> Group:
    settings = settings_of(group).model_dump(mode="json")
    if "initial_lr" in group:
        settings["initial_lr"] = float(group["initial_lr"])
    return Group(names=list(group["param_names"]), settings=settings)


def _free_form(scheduler: Any, job: Mapping[str, Any] | None) -> dict[str, Any]:
    """Encodes the state of the scheduler and the data of the job."""
    try:
        return {"scheduler": scheduler_state(scheduler), "job": encode(dict(job or {}), "job")}
    except UnstorableError as error:
        raise CheckpointError(str(error)) from None


def _make(partial: Path, directory: Path) -> None:
    if directory.exists():
        raise CheckpointError(f"{directory}: exists already; give a new folder, or remove it")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise cannot_write(directory, error) from None


def _within(partial: Path) -> Path:
    if not partial.is_dir():
        raise CheckpointError(
            f"{partial}: process 0 has created this folder, but it does not exist here; "
            "checkpoints must be on a file system that all processes share"
        )
    return partial


def _merge(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the entries of all processes, each with the slices of all of them."""
    merged: dict[str, Any] = {}
    for part in parts:
        for name, entry in part.items():
            known = merged.get(name)
            merged[name] = entry if known is None else _join(name, known, entry)
    return merged


def _join(name: str, known: StateEntry | Weight, other: StateEntry | Weight) -> Any:
    if isinstance(known, Weight) and isinstance(other, Weight):
        slices = known.elements.slices + other.elements.slices
        elements = known.elements.model_copy(update={"slices": slices})
        return known.model_copy(update={"elements": elements})
    assert isinstance(known, StateEntry) and isinstance(other, StateEntry)
    if (known.numbers, known.lists) != (other.numbers, other.lists):
        raise CheckpointError(
            f"{name}: its state differs between processes ({known.numbers}, {other.numbers}): "
            "training has diverged, and nothing was written; resume from an earlier checkpoint"
        )
    tensors = {
        part: sliced.model_copy(update={"slices": sliced.slices + other.tensors[part].slices})
        for part, sliced in known.tensors.items()
    }
    sums = {key: terms + other.sums[key] for key, terms in known.sums.items()}
    return known.model_copy(update={"tensors": tensors, "sums": sums})
