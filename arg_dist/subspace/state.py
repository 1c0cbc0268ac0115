"""The state of a matrix and of a tensor: what it holds, and how that lies over the processes.

A state is a plain dictionary of tensors and Python numbers, so it can be saved, cut and loaded
without executing code; it is empty before the first gradient. :data:`SCHEMA` says of every key what
saving, cutting, loading and counting need to know; only the mathematics knows what a key means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum, auto
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor

State = dict[str, Any]
"""A :class:`MatrixState` or a :class:`TensorState`, for code that follows the schema."""


class TensorState(TypedDict):
    """State of a tensor that full-rank Adam trains."""

    step: int
    """Steps of Adam so far."""
    exp_avg: Tensor
    """``moment.keep``, M; of a tensor, its elements."""
    exp_avg_sq: Tensor
    """``moment.keep``, V."""
    exp_avg_scales: NotRequired[Tensor]
    """Of M in 8 bits (:mod:`arg_dist.subspace.compact`)."""
    exp_avg_sq_scales: NotRequired[Tensor]
    """Of V in 8 bits."""


class MatrixState(TensorState):
    """State of a matrix in low rank; of both moments, ``moment.keep x rank``."""

    basis: Tensor
    """``basis.store x rank``, Q."""
    basis_scales: NotRequired[Tensor]
    """Of Q in 8 bits."""
    rank: int
    refreshes: int
    """Refreshes of this matrix so far."""
    since_refresh: int
    """Steps since the last refresh."""
    gap: int
    """Steps between it and the next."""
    energy: float
    """Share of ``||G||^2`` kept at the last refresh."""
    kept_sq: Tensor
    """``||P||^2`` of the last step, over this process's rows."""
    kept_sq_at_refresh: float
    """``||P||^2`` of the refresh step, over all rows."""
    residual_codes: NotRequired[Tensor]
    """``blocks x (32 bits)`` on the home process, momentum of the residual."""
    residual_scales: NotRequired[Tensor]
    """``blocks`` on the home process, its scales."""
    residual_reach: NotRequired[float]
    """Momentum of ``||G||``, which bounds that of the residual."""
    residual_norm: NotRequired[Tensor]
    """Norm of the residual, with the rule `scaled`."""
    spectrum: NotRequired[list[float]]
    """Share of ``||G||^2`` of each direction up to the largest rank at the last refresh, with a
    budget."""


class Lies(Enum):
    """How the processes that hold a part of a matrix or tensor hold an entry of its state."""

    AS_MOMENTS = auto()
    """A tensor whose rows are cut like the moments."""
    AS_BASIS = auto()
    """A tensor whose rows are cut like the basis."""
    AT_HOME = auto()
    """A tensor whose rows are all on the home process."""
    BESIDE = auto()
    """A tensor of what another one in few bits needs to be read; never saved or cut by itself."""
    SUMMED = auto()
    """A scalar tensor, each process's term of a sum."""
    ALIKE = auto()
    """A scalar tensor, equal on all of them."""
    NUMBER = auto()
    """A Python number, equal on all of them."""
    LIST = auto()
    """A list of Python numbers, equal on all of them."""


class Entry(NamedTuple):
    """One key of the schema.

    Attributes:
        lies: how it lies over the processes.
        dtype: its type; moments of parameters in fp64 have fp64, and moments and bases in fewer
            bits another one in memory.
    """

    lies: Lies
    dtype: torch.dtype | type


SCHEMA: Mapping[str, Entry] = {
    "basis": Entry(Lies.AS_BASIS, torch.float32),
    "exp_avg": Entry(Lies.AS_MOMENTS, torch.float32),
    "exp_avg_sq": Entry(Lies.AS_MOMENTS, torch.float32),
    "residual_codes": Entry(Lies.AT_HOME, torch.uint8),
    "residual_scales": Entry(Lies.AT_HOME, torch.bfloat16),
    "basis_scales": Entry(Lies.BESIDE, torch.float32),
    "exp_avg_scales": Entry(Lies.BESIDE, torch.float32),
    "exp_avg_sq_scales": Entry(Lies.BESIDE, torch.float32),
    "kept_sq": Entry(Lies.SUMMED, torch.float64),
    "residual_norm": Entry(Lies.ALIKE, torch.float64),
    "step": Entry(Lies.NUMBER, int),
    "rank": Entry(Lies.NUMBER, int),
    "refreshes": Entry(Lies.NUMBER, int),
    "since_refresh": Entry(Lies.NUMBER, int),
    "gap": Entry(Lies.NUMBER, int),
    "energy": Entry(Lies.NUMBER, float),
    "kept_sq_at_refresh": Entry(Lies.NUMBER, float),
    "residual_reach": Entry(Lies.NUMBER, float),
    "spectrum": Entry(Lies.LIST, float),
}


def keys_that_lie(*ways: Lies, kind: type[TensorState] = MatrixState) -> tuple[str, ...]:
    """The keys of a kind of state that lie in one of the given ways, in the order of the schema."""
    own = kind.__annotations__.keys() | TensorState.__annotations__.keys()
    return tuple(key for key, entry in SCHEMA.items() if entry.lies in ways and key in own)


SUMMED = keys_that_lie(Lies.SUMMED)
SCALARS = keys_that_lie(Lies.SUMMED, Lies.ALIKE)
OF_EACH_DIRECTION = keys_that_lie(Lies.AS_MOMENTS, Lies.AS_BASIS)
"""Keys of the tensors of a matrix's state that have a column for each direction."""
AT_HOME = keys_that_lie(Lies.AT_HOME)
OF_TENSOR = keys_that_lie(Lies.AS_MOMENTS, kind=TensorState)
WITH_ROWS = (*OF_EACH_DIRECTION, *AT_HOME)
"""Keys of all tensors whose rows are distributed over the processes."""
SCALES = {key: f"{key}_scales" for key in OF_EACH_DIRECTION}
"""Of the tensors that may be kept in few bits, the keys of their scales."""
REQUIRED = frozenset(TensorState.__annotations__) - {*SCALES.values()}
"""Keys of every state that is not empty."""


def numbers_of(state: Mapping[str, Any]) -> dict[str, int | float]:
    """All that is equal on all processes, as Python numbers, without the lists."""
    return {
        key: value.item() if isinstance(value, Tensor) else value
        for key, value in state.items()
        if SCHEMA[key].lies in (Lies.NUMBER, Lies.ALIKE)
    }


def lists_of(state: Mapping[str, Any]) -> dict[str, list[float]]:
    """The lists of a state."""
    return {key: value for key, value in state.items() if SCHEMA[key].lies is Lies.LIST}


def as_scalar(key: str, value: float, device: torch.device) -> Tensor:
    """A scalar of the state, as the tensor that it is."""
    dtype = SCHEMA[key].dtype
    assert isinstance(dtype, torch.dtype)
    return torch.tensor(value, dtype=dtype, device=device)


def with_scalars(numbers: Mapping[str, Any], device: torch.device) -> State:
    """The inverse of :func:`numbers_of`."""
    return {
        key: as_scalar(key, value, device) if SCHEMA[key].lies is Lies.ALIKE else value
        for key, value in numbers.items()
    }


def progress(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a matrix's state tells its user, under the names of ``AdaRankGrad.stats()``."""
    return {
        "rank": state["rank"],
        "energy": state["energy"],
        "steps_since_refresh": state["since_refresh"],
        "refreshes": state["refreshes"],
    }


def unknown_keys(keys: Iterable[str]) -> list[str]:
    """Keys that no state has."""
    return [key for key in keys if key not in SCHEMA]
