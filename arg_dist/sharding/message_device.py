"""The device that a process group's messages pass through."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain

import torch
import torch.distributed as dist

from arg_dist.sharding.fragment import Fragment, Holding

ON_THE_HOST = ("gloo", "mpi", "ucc")
"""Backends whose messages pass through the host's memory."""


def message_device(
    group: dist.ProcessGroup, holdings: Sequence[Holding] = (), known: torch.device | None = None
) -> torch.device:
    """The device of a group's messages, with its index.

    It is the device that the group is bound to; otherwise that of the fragments or, if these are on
    the host, the process's current device.

    Args:
        group: the process group.
        holdings: the fragments that the group shares.
        known: the device of another group of this process, for a group without fragments.

    Raises:
        RuntimeError: the group is bound to a device on which no fragment is, or several processes
            of the host would use the first device.
    """
    has_one = torch.accelerator.is_available()
    kind = torch.accelerator.current_accelerator() if has_one else None
    if dist.get_backend(group) in ON_THE_HOST or kind is None:
        return torch.device("cpu")
    fragments = list(chain.from_iterable(holding.fragments for holding in holdings))
    bound = group.bound_device_id
    if bound is not None:
        _check_bound(bound, kind.type, fragments)
        return bound
    held = (f.target.device for f in fragments if f.target.device.type == kind.type)
    found = next(held, None) or known
    return found if found is not None and found.type == kind.type else _current(kind.type)


def _check_bound(bound: torch.device, kind: str, fragments: Sequence[Fragment]) -> None:
    elsewhere = [f for f in fragments if f.target.device.type == kind and f.target.device != bound]
    if elsewhere and not any(f.target.device == bound for f in fragments):
        raise RuntimeError(
            f"process_group: it is bound to {bound}, but {elsewhere[0].name} is on "
            f"{elsewhere[0].target.device}; move the model to {bound}, or pass "
            "init_process_group the device_id of the model's device"
        )


def _current(kind: str) -> torch.device:
    """The process's current device, unless it is the first one because nobody has set it."""
    index, local = (
        torch.get_device_module(kind).current_device(),
        int(os.environ.get("LOCAL_RANK", 0)),
    )
    if index == 0 < local < torch.accelerator.device_count():
        raise RuntimeError(
            f"process_group: process {local} of this host would send its messages through "
            f"{kind}:0, as the first process does; call torch.{kind}.set_device({local}), or pass "
            f'init_process_group device_id=torch.device("{kind}", {local})'
        )
    return torch.device(kind, index)
