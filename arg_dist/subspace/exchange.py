"""What a piece of mathematics may ask of the other processes: sums of partial results, by rows.

A tall matrix is spread over the processes of a group by *rows*: one half-open interval per process.
A computation that needs others is a generator. It yields an :class:`Exchange` (or a tuple of them)
and is handed back the rows it wants, summed over all processes that have a part of them. Who
carries the request out, and how, is the business of the drivers in ``arg_dist.sharding``.

Two requests are enough, both of them one primitive:

* :func:`sum_scatter`: everyone gets his rows of the sum;
* :func:`gather`: everyone gets the rows he wants of a matrix that is held in parts.

Where many send to one, or one to many, :func:`relayed_sum` and :func:`relayed_gather` go by way of
everyone, so that no process holds, sends or adds up much more than the others.

Where a request would move nothing, it is answered on the spot and never reaches a driver.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

Interval = tuple[int, int]
Rows = tuple[Interval, ...]
"""Which rows of a tall matrix each process of a group has: one half-open interval per process."""

T = TypeVar("T")


@dataclass(frozen=True)
class Exchange:
    """Process `i` has partial results for the rows ``have[i]`` and wants the sums of ``want[i]``.

    Attributes:
        part: this process's partial results, ``rows x ...``, first row = row ``have[me][0]``.
        have: which rows each process contributes to.
        want: which rows each process is handed back.
    """

    part: Tensor
    have: Rows
    want: Rows


Request = Exchange | tuple[Exchange, ...]
Steps = Generator[Request, Tensor | tuple[Tensor, ...], T]
"""A computation that yields requests, is sent their answers, and returns a `T`."""


def exchanges_of(request: Request) -> tuple[Exchange, ...]:
    """What a request asks for, one by one."""
    return request if isinstance(request, tuple) else (request,)


def intersect(a: Interval, b: Interval) -> Interval:
    """The common rows of two intervals; ``(x, x)`` where there are none."""
    low, high = max(a[0], b[0]), min(a[1], b[1])
    return (low, max(low, high))


def is_within(inner: Interval, outer: Interval) -> bool:
    """Whether every row of `inner` is a row of `outer`; an empty interval lies in every other."""
    return inner[0] >= inner[1] or (outer[0] <= inner[0] and inner[1] <= outer[1])


def even_rows(size: int, processes: int) -> Rows:
    """`size` rows cut into `processes` parts whose sizes differ by one row at most."""
    cuts = [size * i // processes for i in range(processes + 1)]
    return tuple(pairwise(cuts))


@lru_cache(maxsize=65536)
def _everyone_has_what_he_wants(have: Rows, want: Rows) -> bool:
    return all(is_within(w, h) for h, w in zip(have, want, strict=True))


@lru_cache(maxsize=65536)
def _nobody_else_contributes(have: Rows, want: Rows) -> bool:
    return all(
        i == j or low >= high
        for i, wanted in enumerate(want)
        for j, held in enumerate(have)
        for low, high in [intersect(wanted, held)]
    )


def tile(rows: Sequence[Interval], wanted: Interval) -> bool:
    """Whether the intervals lie one behind the other, and are just the rows wanted."""
    end = wanted[0]
    for low, high in rows:
        if low != end:
            return False
        end = high
    return end == wanted[1]


def add_up(exchange: Exchange, me: int, contributions: Sequence[tuple[int, Tensor]]) -> Tensor:
    """The rows that process `me` wants, from everyone's rows of them in the order of processes.

    Args:
        exchange: the request.
        me: index of the process that wants.
        contributions: ``(first row, rows)`` of each process that has some of them, `me` included.
    """
    low, high = exchange.want[me]
    if not contributions:
        return exchange.part.new_zeros(max(0, high - low), *exchange.part.shape[1:])
    if tile([(start, start + part.shape[0]) for start, part in contributions], (low, high)):
        return put_together([part for _, part in contributions])
    result = exchange.part.new_zeros(high - low, *exchange.part.shape[1:])
    for start, part in contributions:
        result[start - low : start - low + part.shape[0]] += part
    return result


def put_together(parts: Sequence[Tensor]) -> Tensor:
    """The parts one behind the other; contiguous, as memory decides the order of later sums."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0].contiguous()


def select_rows(part: Tensor, have: Interval, want: Interval) -> Tensor:
    """The rows `want` of a matrix, from a part that has its rows `have`; a view."""
    low, high = want if want[0] < want[1] else (have[0], have[0])
    return part[low - have[0] : high - have[0]]


def gather(part: Tensor, have: Rows, want: Rows, me: int) -> Steps[Tensor]:
    """The rows ``want[me]`` of a matrix of which process `i` holds the rows ``have[i]``.

    Args:
        part: ``have[me] x ...``, this process's rows.
        have: who holds which rows; disjoint, unless everyone already holds what he wants.
        want: who needs which rows.
        me: this process's index in the group.
    """
    if _everyone_has_what_he_wants(have, want):
        return select_rows(part, have[me], want[me])
    return (yield Exchange(part, have, want))  # type: ignore[return-value]


def gather_both(
    parts: tuple[Tensor, Tensor], have: Rows, want: Rows, me: int
) -> Steps[tuple[Tensor, Tensor]]:
    """Two :func:`gather` over the same rows, in one request."""
    if _everyone_has_what_he_wants(have, want):
        return tuple(select_rows(part, have[me], want[me]) for part in parts)  # type: ignore[return-value]
    return (yield tuple(Exchange(part, have, want) for part in parts))  # type: ignore[return-value]


def sum_scatter(part: Tensor, have: Rows, want: Rows, me: int) -> Steps[Tensor]:
    """The rows ``want[me]`` of the sum of everyone's partial results.

    Args:
        part: ``have[me] x ...``, this process's partial results.
        have: who contributes to which rows; may overlap.
        want: who needs which rows.
        me: this process's index in the group.
    """
    if _everyone_has_what_he_wants(have, want) and _nobody_else_contributes(have, want):
        return select_rows(part, have[me], want[me])
    return (yield Exchange(part, have, want))  # type: ignore[return-value]


def sum_scatter_both(
    parts: tuple[Tensor, Tensor], have: Rows, want: Rows, me: int
) -> Steps[tuple[Tensor, Tensor]]:
    """Two :func:`sum_scatter` over the same rows, in one request."""
    if _everyone_has_what_he_wants(have, want) and _nobody_else_contributes(have, want):
        return tuple(select_rows(part, have[me], want[me]) for part in parts)  # type: ignore[return-value]
    return (yield tuple(Exchange(part, have, want) for part in parts))  # type: ignore[return-value]


def relayed_sum(part: Tensor, have: Rows, shares: Rows, want: Rows, me: int) -> Steps[Tensor]:
    """:func:`sum_scatter` in two stages: each process adds up its share of the rows, and passes on.

    Args:
        part: ``have[me] x ...``, this process's partial results.
        have: who contributes to which rows; may overlap.
        shares: the rows, each at one process.
        want: who needs which rows.
        me: this process's index in the group.
    """
    mine = yield from sum_scatter(part, have, shares, me)
    del part  # however long the second stage takes
    return (yield from gather(mine, shares, want, me))


def relayed_gather(part: Tensor, have: Rows, shares: Rows, want: Rows, me: int) -> Steps[Tensor]:
    """:func:`gather` in two stages: one process hands out shares, and each passes on its own.

    Args:
        part: ``have[me] x ...``, this process's rows.
        have: who holds which rows; disjoint.
        shares: the rows, each at one process.
        want: who needs which rows.
        me: this process's index in the group.
    """
    mine = yield from gather(part, have, shares, me)
    return (yield from gather(mine, shares, want, me))
