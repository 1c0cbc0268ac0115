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
from arg_dist.subspace.state import SUMMED, WITH_ROWS, State

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
    everyone = ((0, 1),) * shard.sharding.processes
    requests = {
        key: Exchange(part, have, _only(to, have))
        for key, (part, have) in kept_parts(shard, state).items()
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
    held = whole.keys() & set(WITH_ROWS)
    is_like_it = set(shard.required) <= held <= sizes.keys()
    if not is_like_it or any(whole[key].shape[0] != sizes[key] for key in held):
        return whole
    state, stored = dict(whole), shard.sharding.stored()
    for key in held:
        low, high = stored[key][shard.me]
        state[key] = whole[key][low:high].clone()
    if shard.me != 0:
        state |= {key: torch.zeros_like(whole[key]) for key in SUMMED if key in whole}
    return state


def kept_parts(shard: Shard, state: State) -> dict[str, tuple[Tensor, Rows]]:
    """The rows that this process contributes to each tensor of a state, and those of all."""
    stored, me = shard.sharding.stored(), shard.me
    return {
        key: (select_rows(state[key], stored[key][me], rows[me]), rows)
        for key, rows in shard.sharding.counted().items()
        if key in state
    }


def _only(to: int, have: Rows) -> Rows:
    size = max(stop for _, stop in have)
    return tuple((0, size if i == to else 0) for i in range(len(have)))
