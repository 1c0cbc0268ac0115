"""States of a process's random number generators, as tensors."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def random_states() -> dict[str, Tensor]:
    """Returns the states of torch's generators (CPU and device), Python's and NumPy's."""
    version, internal, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "python": _tensor([version, *internal], torch.int64),
        "python_gauss": _tensor([math.nan if gauss is None else gauss], torch.float64),
    }
    if "numpy" in sys.modules:
        _, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = _tensor([int(key) for key in keys], torch.int64)
        states["numpy_rest"] = _tensor(rest, torch.float64)
    device = _device_module()
    if device is not None:
        states["accelerator"] = device.get_rng_state()
    return states


def restore_random_states(states: Mapping[str, Tensor]) -> None:
    """Restores what :func:`random_states` returned; a generator without a state is unchanged."""
    torch.set_rng_state(states["torch"])
    version, *internal = states["python"].tolist()
    gauss = states["python_gauss"].item()
    random.setstate((version, tuple(internal), None if math.isnan(gauss) else gauss))
    if "numpy" in states:
        import numpy

        position, has_gauss, cached = states["numpy_rest"].tolist()
        keys = states["numpy"].numpy().astype("uint32")
        numpy.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    device = _device_module()
    if device is not None and "accelerator" in states:
        device.set_rng_state(states["accelerator"])


def _tensor(values: Sequence[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")


def _device_module() -> Any:
    has_one = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if has_one else None
    return None if device is None else torch.get_device_module(device)
