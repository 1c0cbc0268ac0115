"""What one process sends and receives in an exchange; found once and cached.

Most exchanges are even: every process sends as many rows to every other one. Then a message is a
row of a matrix, and what is done in Python does not grow with the number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from arg_dist.subspace.distributed import Interval, Rows, intersect, tile

Piece = tuple[int, int, int]
"""A peer process, and rows sent to or received from it, ``[low, high)``."""


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
        count: rows of a part; of `ANY` 0.
        home: the process that has or wants all rows, of `TO_HOME` and `FROM_HOME`.
        outgoing: rows sent to other processes; of `ANY` only.
        incoming: rows from every process that has some of those wanted, including its own rows,
            which are not sent; of `ANY` only.
        tiles: whether the incoming rows are consecutive, so that nothing is summed.
        sums: whether every process has all of the rows wanted.
    """

    kind: Kind
    count: int = 0
    home: int = 0
    outgoing: tuple[Piece, ...] = ()
    incoming: tuple[Piece, ...] = ()
    tiles: bool = False
    sums: bool = False


@lru_cache(maxsize=4096)  # matrices of equal shape mostly share routes
def route(have: Rows, want: Rows, me: int) -> Route:
    """The route of process `me` in an exchange of ``have`` for ``want``."""
    return _even_route(have, want) or route_of_pieces(have, want, me)


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
def _even_route(have: Rows, want: Rows) -> Route | None:
    """The route of all processes if the exchange is even; else None."""
    if _are_equal(have) and _are_equal(want) and have[0] == want[0]:
        count = have[0][1] - have[0][0]
        return Route(Kind.ALL, count, sums=True) if count else None
    if _are_equal(have) and _is_cut_evenly(want, have[0]):
        return Route(Kind.PARTS, want[0][1] - want[0][0], sums=True)
    if _are_equal(want) and _is_cut_evenly(have, want[0]):
        return Route(Kind.ALL, have[0][1] - have[0][0])
    for rows, others, kind in ((want, have, Kind.TO_HOME), (have, want, Kind.FROM_HOME)):
        some = [i for i, (low, high) in enumerate(rows) if low < high]
        if len(some) == 1 and _is_cut_evenly(others, rows[some[0]]):
            return Route(kind, others[0][1] - others[0][0], some[0])
    return None


def _are_equal(rows: Rows) -> bool:
    return all(each == rows[0] for each in rows)


def _is_cut_evenly(rows: Rows, whole: Interval) -> bool:
    """Whether the rows are equal parts of a whole, in the order of the processes."""
    low, high = whole
    count, rest = divmod(high - low, len(rows))
    if rest or not count:
        return False
    return all(each == (low + i * count, low + (i + 1) * count) for i, each in enumerate(rows))


def _pieces(rows: dict[int, Interval]) -> tuple[Piece, ...]:
    return tuple((process, low, high) for process, (low, high) in rows.items() if low < high)
