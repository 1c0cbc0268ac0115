"""Who sends which rows of an exchange to whom, as one process sees it; found out once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from arg_dist.subspace.exchange import Interval, Rows, intersect, tile

Piece = tuple[int, int, int]
"""A process, and rows that it sends or is sent, ``[low, high)``."""


@dataclass(frozen=True)
class Route:
    """What one process sends and is sent in an exchange, in the order of processes.

    Attributes:
        outgoing: to others.
        incoming: from everyone who has some of the rows wanted; its own, too, which are not sent.
        is_for_all: whether every other process is sent the same.
        tiles: whether what comes in lies one behind the other, with nothing to add up.
    """

    outgoing: tuple[Piece, ...]
    incoming: tuple[Piece, ...]
    is_for_all: bool
    tiles: bool


@lru_cache(maxsize=4096)  # matrices of one shape mostly share theirs
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
