"""The whole state, as on a single process: gathered for saving, and cut when it was loaded.

State is sharded, and engines save in two ways that would silently lose most of it. Some write the
first process's state: there, the whole state is gathered on that process first, and each process
takes its rows from it when loading. Others merge the state of all processes by key
(:mod:`arg_dist.packing`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from arg_dist.algorithm import State
from arg_dist.sharding.shard import MatrixShard, Shard, TensorShard
from arg_dist.subspace.exchange import Exchange, Interval, Rows, Steps, select_rows

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
    """This process's part of a state from :func:`whole_state`.

    State of another shape is returned unchanged; :func:`arg_dist.state.fits` detects it.
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
    """The rows of each state tensor that each process contributes; disjoint over the processes."""
    if isinstance(shard, MatrixShard):
        moment, basis = shard.spread.moment.keep, shard.spread.basis.keep
        return {"exp_avg": moment, "exp_avg_sq": moment, "basis": basis}
    assert isinstance(shard, TensorShard)
    return dict.fromkeys(("exp_avg", "exp_avg_sq"), shard.side.keep)


def stored_rows(shard: Shard, key: str) -> Interval:
    """The rows of a state tensor that this process holds."""
    if isinstance(shard, MatrixShard) and key == "basis":
        return shard.spread.store[shard.me]
    return kept_rows(shard)[key][shard.me]


def kept_part(value: Tensor, shard: Shard, key: str) -> Tensor:
    """The rows of a state tensor that this process contributes, out of those it holds."""
    return select_rows(value, stored_rows(shard, key), kept_rows(shard)[key][shard.me])


def _only(to: int, have: Rows) -> Rows:
    size = max(stop for _, stop in have)
    return tuple((0, size if i == to else 0) for i in range(len(have)))
