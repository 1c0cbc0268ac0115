"""Helpers on optimizer state (nested dictionaries of tensors and Python numbers)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from arg_dist.sharding.shard import MatrixShard, Shard, TensorShard
from arg_dist.subspace.spread import row_count


def storage_bytes(states: Iterable[Any]) -> int:
    """Bytes of all distinct storages that the tensors in nested dictionaries reference."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            for inner in value.values():
                visit(inner)

    for state in states:
        visit(state)
    return sum(storages.values())


def fits(shard: Shard, state: Mapping[str, Any]) -> bool:
    """Whether `state` has the rows that this process keeps of the shard; empty state fits."""
    if not state:
        return True
    if isinstance(shard, MatrixShard) != ("basis" in state):
        return False
    rows = state["exp_avg"].shape[0]
    if isinstance(shard, TensorShard):
        return bool(rows == row_count(shard.side.keep[shard.me]))
    assert isinstance(shard, MatrixShard)
    spread = shard.spread
    kept, stored = row_count(spread.moment.keep[spread.me]), row_count(spread.store[spread.me])
    return bool((rows, state["basis"].shape[0]) == (kept, stored))


def matrix_stats(shard: MatrixShard, state: Mapping[str, Any]) -> dict[str, Any]:
    """One matrix's entry in :meth:`arg_dist.AdaRankGrad.stats`."""
    return {
        "name": shard.name,
        "shape": shard.shape,
        "side": shard.side_name,
        "rank": state["rank"],
        "energy": state["energy"],
        "steps_since_refresh": state["since_refresh"],
        "refreshes": state["refreshes"],
        "state_bytes": storage_bytes([state]),
    }


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
