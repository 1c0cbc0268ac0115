"""What one process sends and receives in an exchange; found once and cached.

Most exchanges are even: every process sends as many rows to every other one. Then a message is a
row of a matrix, and what is done in Python does not grow with the number of processes. Parts that
differ a little are padded to the largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import torch
from torch import Tensor

from arg_dist.subspace.distributed import Interval, Rows, intersect, tile

Piece = tuple[int, int, int]
"""A peer process, and rows sent to or received from it, ``[low, high)``."""

WORTH = 8
"""Padding costs at most one row in so many, or a row for each process."""


class Kind(Enum):
    """The kinds of exchanges; all but the last have equal parts on all processes."""

    PARTS = "everyone has all rows and wants a part of their sums"
    ALL = "everyone has a part, or all, and wants all rows"
    TO_HOME = "everyone has a part, and one process wants all rows"
    FROM_HOME = "one process has all rows, and everyone wants a part"
    ANY = "any other"


@dataclass(frozen=True)
class Route:
    """What one process sends and receives in an exchange, in the order of processes.

    Attributes:
        kind: the kind of the exchange, equal on all processes.
        count: rows of a part, of the largest if they differ; of `ANY` 0.
        cut: rows of the part of each process, if they differ; else empty.
        home: the process that has or wants all rows, of `TO_HOME` and `FROM_HOME`.
        outgoing: rows sent to other processes; of `ANY` only.
        incoming: rows from every process that has some of those wanted, including its own rows,
            which are not sent; of `ANY` only.
        tiles: whether the incoming rows are consecutive, so that nothing is summed.
        sums: whether every process has all of the rows wanted.
    """

    kind: Kind
    count: int = 0
    cut: Rows = ()
    home: int = 0
    outgoing: tuple[Piece, ...] = ()
    incoming: tuple[Piece, ...] = ()
    tiles: bool = False
    sums: bool = False


@lru_cache(maxsize=4096)  # matrices of equal shape mostly share routes
def route(have: Rows, want: Rows, me: int) -> Route:
    """The route of process `me` in an exchange of ``have`` for ``want``."""
    return even_route(have, want) or route_of_pieces(have, want, me)


@lru_cache(maxsize=4096)
def route_of_pieces(have: Rows, want: Rows, me: int) -> Route:
    """The same, piece by piece, whatever the kind of the exchange."""
    processes = range(len(have))
    outgoing = _pieces({i: intersect(have[me], want[i]) for i in processes if i != me})
    incoming = _pieces({i: intersect(have[i], want[me]) for i in processes})
    return Route(
        Kind.ANY,
        outgoing=outgoing,
        incoming=incoming,
        tiles=tile([(low, high) for _, low, high in incoming], want[me]),
    )


@lru_cache(maxsize=4096)
def even_route(have: Rows, want: Rows) -> Route | None:
    """The route of all processes if their parts are equal, or nearly so; else None."""
    if _are_equal(have) and _are_equal(want) and have[0] == want[0]:
        count = have[0][1] - have[0][0]
        return Route(Kind.ALL, count, sums=True) if count else None
    for rows, others, kind in ((have, want, Kind.PARTS), (want, have, Kind.ALL)):
        found = _of_parts(kind, others, rows[0]) if _are_equal(rows) else None
        if found is not None:
            return found
    for rows, others, kind in ((want, have, Kind.TO_HOME), (have, want, Kind.FROM_HOME)):
        some = [i for i, (low, high) in enumerate(rows) if low < high]
        if len(some) == 1:
            return _of_parts(kind, others, rows[some[0]], some[0])
    return None


def _of_parts(kind: Kind, parts: Rows, whole: Interval, home: int = 0) -> Route | None:
    """The route if everyone has a part of a whole, in the order of the processes; else None."""
    counts = {high - low for low, high in parts}
    size, most = whole[1] - whole[0], max(counts)
    padding = len(parts) * most - size
    if min(counts) < 1 or padding > max(len(parts), size // WORTH) or not tile(parts, whole):
        return None
    return Route(kind, most, () if len(counts) == 1 else parts, home, sums=kind is Kind.PARTS)


def _are_equal(rows: Rows) -> bool:
    return all(each == rows[0] for each in rows)


@lru_cache(maxsize=1024)
def padded_positions(route: Route, device: torch.device) -> Tensor:
    """``processes * count``, int64: positions in the whole of the rows of all padded parts.

    A part that is shorter ends with its last row twice.
    """
    first = route.cut[0][0]
    low, high = torch.tensor(route.cut, dtype=torch.int64, device="cpu").T[:, :, None] - first
    each = torch.arange(route.count, dtype=torch.int64, device="cpu")
    return torch.minimum(low + each, high - 1).view(-1).to(device)


@lru_cache(maxsize=1024)
def whole_positions(route: Route, device: torch.device) -> Tensor:
    """``rows``, int64: positions in the padded parts, one after the other, of all rows."""
    counts = (high - low for low, high in route.cut)
    kept = [i * route.count + k for i, count in enumerate(counts) for k in range(count)]
    return torch.tensor(kept, dtype=torch.int64, device="cpu").to(device)


def _pieces(rows: dict[int, Interval]) -> tuple[Piece, ...]:
    return tuple((process, low, high) for process, (low, high) in rows.items() if low < high)
