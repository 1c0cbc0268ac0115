"""State on its way to a file and back: whole, as one process would hold it, or packed as it lies.

State is sharded, and engines save in two ways that would lose most of it without a word. Some write
what the first process has: for these the state is put together there first, in the form in which
one process alone would hold it, and everyone cuts his rows out of it again. Others merge what all
processes give them, by key: for these each process packs its state under a key of its own.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from arg_dist.algorithm import State
from arg_dist.config import ConfigError
from arg_dist.sharding.shard import MatrixShard, Shard, TensorShard
from arg_dist.subspace.exchange import Exchange, Interval, Rows, Steps, select_rows

Place = tuple[int, int]
"""Whose state it is: index of the process in its group, and the group's size."""

WHOLE: Place = (0, 1)
ELSEWHERE: Place = (-1, 1)
"""The state was put together on another process."""


def whole_state(shard: Shard, state: State, *, to: int) -> Steps[State | None]:
    """The state of a shard that several processes keep in parts, put together on process `to`.

    Args:
        shard: this process's part.
        state: its state; empty before the first gradient.
        to: index of the process that gets everything.

    Returns:
        The state as one process alone would hold it, on the CPU; None on the others.
    """
    if not state:
        return {} if shard.me == to else None
    rows = kept_rows(shard)
    everyone = ((0, 1),) * len(rows["exp_avg"])
    requests = {
        key: Exchange(kept_part(state[key], shard, key), have, _only(to, have))
        for key, have in rows.items()
    }
    if "kept_sq" in state:
        requests["kept_sq"] = Exchange(state["kept_sq"].view(1), everyone, _only(to, everyone))
    answers = yield tuple(requests.values())
    if shard.me != to:
        return None
    whole = {**state, **dict(zip(requests, answers, strict=True))}
    if "kept_sq" in whole:
        whole["kept_sq"] = whole["kept_sq"].view(())
    return {
        key: value.cpu() if isinstance(value, Tensor) else value for key, value in whole.items()
    }


def cut_state(shard: Shard, whole: State) -> State:
    """This process's part of what :func:`whole_state` put together.

    State of another shape stays as it is; :func:`arg_dist.state.fits` finds it out.
    """
    sizes = {key: max(stop for _, stop in rows) for key, rows in kept_rows(shard).items()}
    if any(key not in whole or whole[key].shape[0] != size for key, size in sizes.items()):
        return whole
    state = dict(whole)
    for key in sizes:
        low, high = stored_rows(shard, key)
        state[key] = whole[key][low:high].clone()
    if "kept_sq" in whole and shard.me != 0:
        state["kept_sq"] = torch.zeros_like(whole["kept_sq"])  # a sum over the processes
    return state


def kept_rows(shard: Shard) -> dict[str, Rows]:
    """Which rows of each tensor of the state every process speaks for; each row once."""
    if isinstance(shard, MatrixShard):
        moment, basis = shard.spread.moment.keep, shard.spread.basis.keep
        return {"exp_avg": moment, "exp_avg_sq": moment, "basis": basis}
    assert isinstance(shard, TensorShard)
    return dict.fromkeys(("exp_avg", "exp_avg_sq"), shard.side.keep)


def stored_rows(shard: Shard, key: str) -> Interval:
    """Which rows of a tensor of the state this process holds."""
    if isinstance(shard, MatrixShard) and key == "basis":
        return shard.spread.store[shard.me]
    return kept_rows(shard)[key][shard.me]


def kept_part(value: Tensor, shard: Shard, key: str) -> Tensor:
    """The rows of a tensor of the state that this process speaks for, out of those it holds."""
    return select_rows(value, stored_rows(shard, key), kept_rows(shard)[key][shard.me])


def _only(to: int, have: Rows) -> Rows:
    size = max(stop for _, stop in have)
    return tuple((0, size if i == to else 0) for i in range(len(have)))


def pack(
    units: Mapping[str, State], place: Place, calls: int, device: torch.device
) -> dict[str, Any]:
    """One parameter's state under a key that no other process uses.

    As bytes, because the ranks decide its size and readers would ask for the size beforehand. The
    number beside them is the form's; some readers want at least one tensor, on the `device`.
    """
    buffer = io.BytesIO()
    torch.save({"process": place, "calls": calls, "units": dict(units)}, buffer)
    return {_key(place): buffer.getvalue(), "form": torch.ones(1, device=device)}


def is_packed(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of a state dictionary comes from :func:`pack`."""
    return any(isinstance(value, bytes) for value in entry.values())


def unpack(entry: Mapping[str, Any], place: Place | None) -> tuple[Place, int, dict[str, State]]:
    """What was given to :func:`pack`: place, calls, units. Loading runs no code.

    Args:
        entry: what one process packed, or all of them did.
        place: which of them to unpack; None for the only one.

    Raises:
        ConfigError: it is not among them.
    """
    packed = {key: value for key, value in entry.items() if isinstance(value, bytes)}
    key = _key(place) if place is not None and len(packed) > 1 else next(iter(packed))
    if key not in packed:
        raise ConfigError(
            f"load_state_dict: no state of {key} was saved, but of {', '.join(packed)}; start as "
            "many processes as there were then, or save with arg_dist.checkpoint, from which any "
            "number of processes can go on"
        )
    unpacked = torch.load(io.BytesIO(packed[key]), map_location="cpu", weights_only=True)
    return unpacked["process"], unpacked["calls"], unpacked["units"]


def _key(place: Place) -> str:
    return f"process {place[0]} of {place[1]}"
