"""DeepSpeed's own checkpoints, on as many processes and, by its universal checkpoint, on others.

At stage 0 DeepSpeed saves the first process's state for all of them, so it is put together there.

At stages 1 to 3 it pickles the state of each process, with which as many processes can go on. For
another number, its converter makes a universal checkpoint, and knows of Adam's two moments in flat
tensors only. So it is shown moments of zeros, which take no room, and the state itself lies beside
DeepSpeed's files in a checkpoint of our own, from which each process of the new job takes its part.
The converter copies no file of ours, but keeps a note of where that checkpoint is.
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
from arg_dist.optimizer import AdaRankGrad
from arg_dist.parameter_groups import members
from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.job import job_communicator

STATE_FOLDER = "adarankgrad"
"""Folder of a DeepSpeed checkpoint in which the optimizer's state lies, in our own format."""

NOTE = "adarankgrad_state"
"""Key of DeepSpeed's client state that tells where this folder is, and what must be in it."""

OTHER_NUMBER = (
    "To go on with another number of processes, convert the checkpoint: python -m "
    "deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder DIR/TAG "
    '--output_folder DIR/TAG_universal, and load that with "checkpoint": {"load_universal": true} '
    "in the JSON. Checkpoints of arg_dist.checkpoint.save need no conversion."
)


def follow_checkpoints(engine: Any, optimizer: AdaRankGrad) -> None:
    """Lets an engine's ``save_checkpoint`` and ``load_checkpoint`` take along what they would lose.

    Args:
        engine: DeepSpeed's, which is about to wrap the optimizer.
        optimizer: its optimizer.
    """
    if not engine.zero_optimization():
        engine.save_checkpoint = _consolidating(engine.save_checkpoint, optimizer)
        return
    # DeepSpeed 0.19.8 converts from wrong places of the weights where they were dealt around; the
    # converter stops (KeyError: 'exp_avg') instead
    if engine.zero_optimization_stage() == 3 or not engine.zero_round_robin_gradients():
        optimizer.register_state_dict_post_hook(_add_zero_moments)
    engine.save_checkpoint = _saving_state(engine.save_checkpoint, engine, optimizer)
    engine.load_checkpoint = _loading_state(engine.load_checkpoint, engine, optimizer)


def _consolidating(save: Callable[..., Any], optimizer: AdaRankGrad) -> Callable[..., Any]:
    """`save`, after the state was put together on the process that will write it."""

    @functools.wraps(save)
    def consolidate_and_save(*args: Any, **kwargs: Any) -> Any:
        optimizer.consolidate_state_dict()
        return save(*args, **kwargs)

    return consolidate_and_save


def _saving_state(save: Callable[..., Any], engine: Any, optimizer: AdaRankGrad) -> Any:
    """`save`, which also writes the optimizer's state into a folder of the checkpoint."""
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_with_state(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        # node-local checkpoints are for the same processes on the same nodes, which need no folder
        if given["save_dir"] and not engine.use_node_local_storage():
            tag = given["tag"]
            given["tag"] = f"global_step{engine.global_steps}" if tag is None else str(tag)
            folder = Path(given["save_dir"]) / given["tag"] / STATE_FOLDER
            note = _write_state(folder, optimizer, engine.global_steps)
            given["client_state"] = {**(given["client_state"] or {}), NOTE: note}
        return save(*call.args, **call.kwargs)

    return save_with_state


def _write_state(folder: Path, optimizer: AdaRankGrad, step: int) -> dict[str, str]:
    """Writes the state, in the place of what was saved under the same tag; returns the note."""
    processes = _processes_of(optimizer)

    def remove() -> None:
        if processes.me == 0 and folder.exists():
            shutil.rmtree(folder)

    on_all(processes, remove)
    arg_dist.checkpoint.save(folder, optimizer, step=step, weights=False)
    [written, *_] = on_all(processes, lambda: describe(folder / INDEX_NAME).sha256)
    return {"folder": str(folder.resolve()), "tag": folder.parent.name, "sha256": written}


def _loading_state(load: Callable[..., Any], engine: Any, optimizer: AdaRankGrad) -> Any:
    """`load`, which after a universal checkpoint brings back the optimizer's state."""
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
        for group, own in zip(groups, before, strict=True):  # stage 3 puts the first one's into all
            group.update(own)
        if given["load_optimizer_states"] and not given["load_module_only"]:
            _read_state(Path(path).parent, note, optimizer)
        return path, client_state

    return load_with_state


def _read_state(checkpoint: Path, note: Mapping[str, str] | None, optimizer: AdaRankGrad) -> None:
    """Brings back the state that belongs to a universal checkpoint.

    Raises:
        CheckpointError: on every process: it is not to be found, or is damaged.
    """
    processes = _processes_of(optimizer)
    [folder, *_] = on_all(processes, lambda: _find_state(checkpoint, note))
    index = verified_index(folder, processes)
    index = index.model_copy(update={"random_states": []})  # DeepSpeed leaves them to the user
    restore(folder, index, optimizer, model=None, scheduler=None, weights=False)


def _find_state(checkpoint: Path, note: Mapping[str, str] | None) -> Path:
    """Where the state of a universal checkpoint lies."""
    if note is None:
        raise CheckpointError(
            f"{checkpoint}: it was not saved with AdaRankGrad, or the checkpoint was on node-local "
            "storage; give load_optimizer_states=False to go on with the weights alone"
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
        f"{checkpoint}: the optimizer's state does not lie beside it: "
        + (f"{found[0]} is that of a later save; " if found else "")
        + f"copy the folder {STATE_FOLDER} of the checkpoint that it was converted from "
        f"({note['folder']}) into it"
    )


# -- what the converter asks for -----------------------------------------------------------------


def _add_zero_moments(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Adds Adam's state of every flat tensor: one zero that counts as many, and a step."""
    assert isinstance(optimizer, AdaRankGrad)
    for index, target in enumerate(members(optimizer.param_groups)):
        zeros = torch.zeros(1).expand(target.numel())
        dense = {"step": optimizer.calls, "exp_avg": zeros, "exp_avg_sq": zeros}
        saved["state"][index] = {**saved["state"].get(index, {}), **dense}


def _drop_zero_moments(engine: Any, optimizer: AdaRankGrad) -> None:
    """Frees the moments of zeros, by now as large as the weights."""
    for target, units in optimizer.state.items():
        optimizer.state[target] = {k: v for k, v in units.items() if isinstance(v, Mapping)}
    for parameter in engine.module.parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            mapping.optim_fragment = {}


def _processes_of(optimizer: AdaRankGrad) -> Communicator:
    return job_communicator(optimizer.process_group, optimizer.bind())
