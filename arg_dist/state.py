"""Optimizer state as nested dictionaries of tensors: its size, its device, copies of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def storage_bytes(states: Iterable[Any]) -> int:
    """Bytes of all distinct storages that the tensors in nested dictionaries reference."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            for inner in value.values():
                visit(inner)

    for state in states:
        visit(state)
    return sum(storages.values())


def move_state(state: dict[str, Any], device: torch.device) -> None:
    """Move a state's tensors to `device`, in place, if the model or the state was moved."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.device != device:
            state[key] = value.to(device)


def copy_state(value: Any, device: torch.device) -> Any:
    """Copy nested dictionaries to `device`; dtypes are kept."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: copy_state(inner, device) for key, inner in value.items()}
    return value
