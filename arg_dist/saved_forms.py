"""The whole state, as on a single process: gathered for saving, and cut when it was loaded.

State is sharded, and engines save in two ways that would silently lose most of it. Some write the
first process's state: there, the whole state is gathered on that process first, and each process
takes its rows from it when loading. Others merge the state of all processes by key
(:mod:`arg_dist.packing`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from arg_dist.sharding.shard import Shard
from arg_dist.subspace.exchange import Exchange, Rows, Steps, select_rows
from arg_dist.subspace.state import SUMMED, State

Place = tuple[int, int]
"""Owner of a state: index of the process in its group, and the group's size."""

WHOLE: Place = (0, 1)
ELSEWHERE: Place = (-1, 1)
"""The state was gathered on another process."""


def whole_state(shard: Shard, state: State, *, to: int) -> Steps[State | None]:
    """Gather the state of a shard from all processes on process `to`.

    Args:
        shard: this process's part.
        state: its state; empty before the first gradient.
        to: index of the process that receives the whole state.

    Returns:
        On `to`, the state as a single process would hold it, on the CPU; None on the others.
    """
    if not state:
        return {} if shard.me == to else None
    counted = shard.sharding.counted()
    everyone = ((0, 1),) * shard.sharding.processes
    requests = {
        key: Exchange(kept_part(state[key], shard, key), have, _only(to, have))
        for key, have in counted.items()
    }
    sums = [key for key in SUMMED if key in state]
    requests |= {k: Exchange(state[k].view(1), everyone, _only(to, everyone)) for k in sums}
    answers = yield tuple(requests.values())
    if shard.me != to:
        return None
    whole = {**state, **dict(zip(requests, answers, strict=True))}
    whole |= {key: whole[key].view(()) for key in sums}
    return {
        key: value.cpu() if isinstance(value, Tensor) else value for key, value in whole.items()
    }


def cut_state(shard: Shard, whole: State) -> State:
    """This process's part of a state from :func:`whole_state`.

    State of another shape is returned unchanged; :meth:`Shard.fits` detects it.
    """
    sizes = {key: max(end for _, end in rows) for key, rows in shard.sharding.counted().items()}
    if any(key not in whole or whole[key].shape[0] != size for key, size in sizes.items()):
        return whole
    state = dict(whole)
    for key, rows in shard.sharding.stored().items():
        low, high = rows[shard.me]
        state[key] = whole[key][low:high].clone()
    if shard.me != 0:
        state |= {key: torch.zeros_like(whole[key]) for key in SUMMED if key in whole}
    return state


def kept_part(value: Tensor, shard: Shard, key: str) -> Tensor:
    """The rows of a state tensor that this process contributes, out of those it holds."""
    stored, counted = shard.sharding.stored()[key], shard.sharding.counted()[key]
    return select_rows(value, stored[shard.me], counted[shard.me])


def _only(to: int, have: Rows) -> Rows:
    size = max(stop for _, stop in have)
    return tuple((0, size if i == to else 0) for i in range(len(have)))
