"""DeepSpeed's own checkpoints: native ones, and universal ones for another number of processes.

At stage 0 DeepSpeed saves the first process's state for all processes, so the state is consolidated
there first.

At stages 1 to 3 it pickles the state of each process, from which the same number of processes can
resume. For another number, its converter creates a universal checkpoint, but supports only Adam's
two moments in flat tensors. It therefore receives moments of zeros, which take no space, and the
actual state is stored next to DeepSpeed's files in an arg_dist checkpoint, from which each process
of the new job reads its part. The converter does not copy that checkpoint, but preserves a note of
its location.
"""

from __future__ import annotations

import functools
import inspect
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import arg_dist.checkpoint
from arg_dist.checkpoint import CheckpointError
from arg_dist.checkpoint.files import describe, on_all
from arg_dist.checkpoint.index import INDEX_NAME
from arg_dist.checkpoint.reading import restore, verified_index
from arg_dist.config import RENAMED
from arg_dist.library_internals import MASTER_WEIGHTS
from arg_dist.optimizer import AdaRankGrad
from arg_dist.parameter_groups import members
from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.job import job_communicator
from arg_dist.subspace.state import TensorState

STATE_FOLDER = "adarankgrad"
"""Folder inside a DeepSpeed checkpoint for the optimizer's state, in arg_dist's format."""

NOTE = "adarankgrad_state"
"""Key in DeepSpeed's client state for the location and checksum of this folder."""

OTHER_NUMBER = (
    "To resume on another number of processes, convert the checkpoint with python -m "
    "deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder DIR/TAG "
    '--output_folder DIR/TAG_universal, and load it with "checkpoint": {"load_universal": true} '
    "in the JSON. Checkpoints of arg_dist.checkpoint.save need no conversion."
)


def follow_checkpoints(engine: Any, optimizer: AdaRankGrad) -> None:
    """Makes an engine's ``save_checkpoint`` and ``load_checkpoint`` include the optimizer's state.

    Args:
        engine: DeepSpeed's engine, before it wraps the optimizer.
        optimizer: the optimizer of the engine.
    """
    if not engine.zero_optimization():
        engine.save_checkpoint = _consolidating(engine.save_checkpoint, optimizer)
        return
    # with round_robin_gradients DeepSpeed 0.19.8 converts from wrong offsets of the weights;
    # without the moments the converter stops (KeyError: 'exp_avg') instead
    if engine.zero_optimization_stage() == 3 or not engine.zero_round_robin_gradients():
        optimizer.register_state_dict_post_hook(_add_zero_moments)
    engine.save_checkpoint = _saving_state(engine.save_checkpoint, engine, optimizer)
    engine.load_checkpoint = _loading_state(engine.load_checkpoint, engine, optimizer)


def _consolidating(save: Callable[..., Any], optimizer: AdaRankGrad) -> Callable[..., Any]:
    """Wraps `save` so that it first consolidates the state on the process that writes it."""

    @functools.wraps(save)
    def consolidate_and_save(*args: Any, **kwargs: Any) -> Any:
        optimizer.consolidate_state_dict()
        return save(*args, **kwargs)

    return consolidate_and_save


def _saving_state(save: Callable[..., Any], engine: Any, optimizer: AdaRankGrad) -> Any:
    """Wraps `save` so that it also writes the optimizer's state to a folder of the checkpoint."""
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_with_state(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        # node-local checkpoints are loaded by the same processes on the same nodes only
        if given["save_dir"] and not engine.use_node_local_storage():
            tag = given["tag"]
            given["tag"] = f"global_step{engine.global_steps}" if tag is None else str(tag)
            folder = Path(given["save_dir"]) / given["tag"] / STATE_FOLDER
            note = _write_state(folder, optimizer, engine.global_steps)
            given["client_state"] = {**(given["client_state"] or {}), NOTE: note}
        return save(*call.args, **call.kwargs)

    return save_with_state


def _write_state(folder: Path, optimizer: AdaRankGrad, step: int) -> dict[str, str]:
    """Writes the state, replacing that of an earlier save with the same tag; returns the note."""
    processes = _processes_of(optimizer)

    def remove() -> None:
        if processes.me == 0 and folder.exists():
            shutil.rmtree(folder)

    on_all(processes, remove)
    arg_dist.checkpoint.save(folder, optimizer, step=step, weights=False)
    [written, *_] = on_all(processes, lambda: describe(folder / INDEX_NAME).sha256)
    return {"folder": str(folder.resolve()), "tag": folder.parent.name, "sha256": written}


def _loading_state(load: Callable[..., Any], engine: Any, optimizer: AdaRankGrad) -> Any:
    """Wraps `load` so that it restores the optimizer's state after a universal checkpoint."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def load_with_state(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        groups = optimizer.param_groups
        before = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        try:
            path, client_state = load(*args, **kwargs)
        except Exception as error:
            if type(error).__name__ == "ZeRORuntimeException":
                error.add_note(OTHER_NUMBER)
            raise
        note = (client_state or {}).pop(NOTE, None)
        if path is None or not engine.load_universal_checkpoint():
            return path, client_state
        _drop_zero_moments(engine, optimizer)
        # all keys of the saved groups are in these now; at stage 3, those of the first one in all
        for group, own in zip(groups, before, strict=True):
            for earlier in RENAMED:
                group.pop(earlier, None)
            group.update(own)
        if given["load_optimizer_states"] and not given["load_module_only"]:
            _read_state(Path(path).parent, note, optimizer)
        return path, client_state

    return load_with_state


def _read_state(checkpoint: Path, note: Mapping[str, str] | None, optimizer: AdaRankGrad) -> None:
    """Restores the optimizer's state that belongs to a universal checkpoint.

    Raises:
        CheckpointError: on every process: the state is not found, or is damaged.
    """
    processes = _processes_of(optimizer)
    [folder, *_] = on_all(processes, lambda: _find_state(checkpoint, note))
    index = verified_index(folder, processes)
    index = index.model_copy(update={"random_states": []})  # DeepSpeed leaves them to the user
    restore(folder, index, optimizer, model=None, scheduler=None, weights=False)


def _find_state(checkpoint: Path, note: Mapping[str, str] | None) -> Path:
    """Returns the folder that contains the optimizer's state of a universal checkpoint."""
    if note is None:
        raise CheckpointError(
            f"{checkpoint}: was not saved with AdaRankGrad, or was saved to node-local storage; "
            "pass load_optimizer_states=False to resume with the weights only"
        )
    places = [
        checkpoint / STATE_FOLDER,
        checkpoint.parent / note["tag"] / STATE_FOLDER,
        Path(note["folder"]),
    ]
    found = [place for place in dict.fromkeys(places) if (place / INDEX_NAME).is_file()]
    for place in found:
        if describe(place / INDEX_NAME).sha256 == note["sha256"]:
            return place
    raise CheckpointError(
        f"{checkpoint}: the optimizer's state was not found: "
        + (f"{found[0]} is from a later save; " if found else "")
        + f"copy the folder {STATE_FOLDER} of the checkpoint from which it was converted "
        f"({note['folder']}) into it"
    )


# -- what the converter requires -----------------------------------------------------------------


def _add_zero_moments(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Adds Adam's state for every flat tensor: a step, and moments expanded from a single zero."""
    assert isinstance(optimizer, AdaRankGrad)
    for index, target in enumerate(members(optimizer.param_groups)):
        zeros = torch.zeros(1, dtype=torch.float32, device="cpu").expand(target.numel())
        dense = TensorState(step=optimizer.calls, exp_avg=zeros, exp_avg_sq=zeros)
        saved["state"][index] = {**saved["state"].get(index, {}), **dense}


def _drop_zero_moments(engine: Any, optimizer: AdaRankGrad) -> None:
    """Frees the moments of zeros, which are as large as the weights after loading."""
    for target, units in optimizer.state.items():
        optimizer.state[target] = {k: v for k, v in units.items() if isinstance(v, Mapping)}
    for parameter in engine.module.parameters():
        mapping = MASTER_WEIGHTS.get(parameter)
        if mapping is not None:
            mapping.optim_fragment = {}


def _processes_of(optimizer: AdaRankGrad) -> Communicator:
    return job_communicator(optimizer.process_group, optimizer.bind())
