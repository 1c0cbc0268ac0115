"""Copies between devices: one for each message and device, through pinned memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gathered(pieces: Sequence[Tensor], device: torch.device) -> Tensor:
    """Concatenate vectors of one dtype on a device; one copy from each other device.

    Args:
        pieces: at least one vector, on any devices.
        device: device of the result.
    """
    if all(piece.device == device for piece in pieces):
        return torch.cat(list(pieces))
    arrived: list[Tensor | None] = [None] * len(pieces)
    for source in dict.fromkeys(piece.device for piece in pieces):
        places = [i for i, piece in enumerate(pieces) if piece.device == source]
        moved = moved_to([pieces[i] for i in places], device)
        if len(places) == len(pieces):
            return moved
        lengths = [pieces[i].numel() for i in places]
        for i, piece in zip(places, torch.split_with_sizes(moved, lengths), strict=True):
            arrived[i] = piece
    return torch.cat([piece for piece in arrived if piece is not None])


def spread_out(
    joined: Tensor, pieces: Sequence[Tensor], devices: Sequence[torch.device]
) -> Sequence[Tensor]:
    """Bring each piece of a message to its device; one copy to each device other than its own.

    Args:
        joined: the message.
        pieces: views of it that together are all of it, in order.
        devices: device that each piece is wanted on.
    """
    wanted = [device for device in dict.fromkeys(devices) if device != joined.device]
    if not wanted:
        return pieces
    lengths = [piece.numel() for piece in pieces]
    if len(set(devices)) == 1:
        return torch.split_with_sizes(moved_to([joined], wanted[0]), lengths)
    arrived = list(pieces)
    for device in wanted:
        places = [i for i, target in enumerate(devices) if target == device]
        moved = moved_to([pieces[i] for i in places], device)
        parts = torch.split_with_sizes(moved, [lengths[i] for i in places])
        for i, piece in zip(places, parts, strict=True):
            arrived[i] = piece
    return arrived


def moved_to(pieces: Sequence[Tensor], device: torch.device) -> Tensor:
    """Concatenate vectors of one device and dtype, and copy the result to another device, once."""
    source, numel = pieces[0].device, sum(piece.numel() for piece in pieces)
    if source == device:
        return torch.cat(list(pieces))
    if source.type == "cpu":
        joined = torch.cat(list(pieces), out=_on_the_host(numel, pieces[0].dtype, device))
        # the allocator of pinned memory keeps it until the copy has completed
        return joined.to(device, non_blocking=True)
    joined = torch.cat(list(pieces))
    if device.type == "cpu":
        return _on_the_host(numel, joined.dtype, source).copy_(joined)
    return joined.to(device, non_blocking=True)


def _on_the_host(numel: int, dtype: torch.dtype, other: torch.device) -> Tensor:
    """Host memory for a copy from or to another device; pinned where that device can use it."""
    pinned = torch.accelerator.is_available() and other.type != "meta"
    return torch.empty(numel, dtype=dtype, device="cpu", pin_memory=pinned)
