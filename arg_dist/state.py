"""Optimizer state as nested dictionaries of tensors: its device, copies of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


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
