"""Copies between devices: one for each message and device, through pinned memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 8
"""Byte alignment of each tensor in a copy, so that it can be viewed as any dtype."""


def moved_together(tensors: Sequence[Tensor], devices: Sequence[torch.device]) -> list[Tensor]:
    """Each tensor on its device, itself if it is there; one copy for each pair of devices.

    Args:
        tensors: of any shapes and types.
        devices: where each is wanted.
    """
    moved = list(tensors)
    pairs = [(tensor.device, device) for tensor, device in zip(tensors, devices, strict=True)]
    for pair in dict.fromkeys(pairs):
        if pair[0] == pair[1]:
            continue
        places = [i for i, each in enumerate(pairs) if each == pair]
        pieces = [_as_bytes(tensors[i]) for i in places]
        arrived = moved_to(torch.cat(pieces), pair[1])
        parts = torch.split_with_sizes(arrived, [piece.numel() for piece in pieces])
        for i, part in zip(places, parts, strict=True):
            tensor = tensors[i]
            moved[i] = part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return moved


def _as_bytes(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % ALIGNMENT))


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
