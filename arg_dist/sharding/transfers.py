"""Copies of messages between devices, through pinned memory."""

from __future__ import annotations

import torch
from torch import Tensor


def moved_to(message: Tensor, device: torch.device) -> Tensor:
    """A copy of a vector on another device.

    Args:
        message: the vector.
        device: where it is wanted.
    """
    if message.device.type == "cpu":
        pinned = _on_the_host(message, device).copy_(message)
        # the allocator of pinned memory keeps it until the copy has completed
        return pinned.to(device, non_blocking=True)
    if device.type == "cpu":
        return _on_the_host(message, message.device).copy_(message)
    return message.to(device, non_blocking=True)


def _on_the_host(message: Tensor, other: torch.device) -> Tensor:
    """Host memory for a copy from or to another device; pinned where that device can use it."""
    pinned = torch.accelerator.is_available() and other.type != "meta"
    return torch.empty(message.shape, dtype=message.dtype, device="cpu", pin_memory=pinned)
