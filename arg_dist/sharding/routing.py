"""The rows that one process sends and receives in an exchange; computed once and cached."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from arg_dist.subspace.distributed import Interval, Rows, intersect, tile

Piece = tuple[int, int, int]
"""A peer process, and rows sent to or received from it, ``[low, high)``."""


@dataclass(frozen=True)
class Route:
    """What one process sends and receives in an exchange, in the order of processes.

    Attributes:
        outgoing: rows sent to other processes.
        incoming: rows from every process that has some of those wanted, including its own rows,
            which are not sent.
        is_for_all: whether every other process receives the same rows.
        tiles: whether the incoming rows are consecutive, so that nothing is summed.
    """

    outgoing: tuple[Piece, ...]
    incoming: tuple[Piece, ...]
    is_for_all: bool
    tiles: bool


@lru_cache(maxsize=4096)  # matrices of equal shape mostly share routes
def route(have: Rows, want: Rows, me: int) -> Route:
    """The route of process `me` in an exchange of ``have`` for ``want``."""
    processes = range(len(have))
    outgoing = _pieces({i: intersect(have[me], want[i]) for i in processes if i != me})
    incoming = _pieces({i: intersect(have[i], want[me]) for i in processes})
    sent = {(low, high) for _, low, high in outgoing}
    return Route(
        outgoing,
        incoming,
        is_for_all=len(sent) == 1 and len(outgoing) == len(have) - 1,
        tiles=tile([(low, high) for _, low, high in incoming], want[me]),
    )


def _pieces(rows: dict[int, Interval]) -> tuple[Piece, ...]:
    return tuple((process, low, high) for process, (low, high) in rows.items() if low < high)
