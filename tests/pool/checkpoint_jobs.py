"""Optimizers to be saved and loaded, and how to see whether they are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrices import gaussian
from one_process import feed, parameters_of

from arg_dist import AdaRankGrad
from arg_dist.checkpoint import CheckpointError, Checkpoints, load

SHAPES = [(24, 16), (16, 40), (3, 12, 10), (10,)]
SETTINGS = {"max_rank": 4, "min_rank": 1, "lr": 0.1}


def build(group: Any, shapes=SHAPES, names="abcd", **settings: Any) -> AdaRankGrad:
    named = [
        (name, torch.nn.Parameter(gaussian(*shape, seed=i)))
        for i, (name, shape) in enumerate(zip(names, shapes, strict=True))
    ]
    return AdaRankGrad(named, process_group=group, **{**SETTINGS, **settings})


def step(optimizer: AdaRankGrad, number: int) -> None:
    shapes = [parameter.shape for parameter in parameters_of(optimizer)]
    feed(optimizer, *(gaussian(*shape, seed=50 * number + i) for i, shape in enumerate(shapes)))


Snapshot = dict[str, Any]


def snapshot(optimizer: AdaRankGrad) -> Snapshot:
    """Weights, state and settings."""
    found: Snapshot = {"calls": optimizer.calls}
    for group in optimizer.param_groups:
        found |= {key: value for key, value in group.items() if key != "params"}
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            found[name] = parameter.detach().clone()
            for unit, state in optimizer.state[parameter].items():
                found |= {f"{name}.{unit}.{key}": value for key, value in state.items()}
    return {key: value.clone() if torch.is_tensor(value) else value for key, value in found.items()}


def same(one: Snapshot, other: Snapshot) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key]
        for key, value in one.items()
    )


def told(action: Callable[[], Any]) -> str:
    """The words of the CheckpointError that `action` must end in."""
    with pytest.raises(CheckpointError) as raised:
        action()
    return str(raised.value)


def load_one(group: Any, checkpoint: Path) -> Snapshot:
    optimizer = build(group)
    load(checkpoint, optimizer)
    return snapshot(optimizer)


def save_three(group: Any, folder: Path) -> None:
    optimizer = build(group)
    checkpoints = Checkpoints(folder, optimizer)
    for number in (1, 2, 3):
        step(optimizer, number)
        checkpoints.save(number)
    checkpoints.wait()


def load_auto(group: Any, folder: Path) -> Any:
    """What was loaded, or what was said."""
    checkpoints = Checkpoints(folder, build(group))
    try:
        return checkpoints.load()
    except CheckpointError as error:
        return str(error)
