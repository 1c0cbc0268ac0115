"""Data that a matrix requests from other processes, in the order of :mod:`arg_dist.algorithm`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from arg_dist.algorithm import POLAR_TYPES
from arg_dist.config import AdaRankGradConfig
from arg_dist.planning.rows import Counts, Spans, sent
from arg_dist.subspace.residual import SCALES_ROWS
from arg_dist.subspace.spread import Spread

FP32, FP64 = 4, 8
"""Bytes per number."""


class Request(NamedTuple):
    """Rows that processes have and want, and the bytes per row of each tensor sent.

    Partial results are summed if `adds`; otherwise rows are gathered.
    """

    have: Spans
    want: Spans
    row_bytes: tuple[int, ...]
    adds: bool = False


@dataclass(frozen=True, eq=False)
class Sides:
    """The row intervals of a spread as arrays over the matrix's owners.

    Attributes:
        spread: from :func:`arg_dist.sharding.layout.matrix_spread`, restricted to owners.
    """

    spread: Spread
    elements_keep: Spans = field(init=False)
    elements_update: Spans = field(init=False)
    moment_touch: Spans = field(init=False)
    moment_keep: Spans = field(init=False)
    moment_update: Spans = field(init=False)
    basis_touch: Spans = field(init=False)
    basis_keep: Spans = field(init=False)
    store: Spans = field(init=False)

    def __post_init__(self) -> None:
        moment, basis, elements = self.spread.moment, self.spread.basis, self.spread.elements
        for name, rows in (
            ("elements_keep", elements.keep),
            ("elements_update", elements.update),
            ("moment_touch", moment.touch),
            ("moment_keep", moment.keep),
            ("moment_update", moment.update),
            ("basis_touch", basis.touch),
            ("basis_keep", basis.keep),
            ("store", self.spread.store),
        ):
            object.__setattr__(self, name, Spans.of(rows))

    @property
    def processes(self) -> int:
        """Number of owners."""
        return self.spread.processes

    def whole(self, size: int) -> Spans:
        """All rows on every owner."""
        return Spans.whole(self.processes, size)

    def at(self, home: int, size: int) -> Spans:
        """All rows on the process `home`."""
        return Spans.at(home, self.processes, size)

    def relay(self, home: int, size: int) -> Spans:
        """The rows that each owner relays to or from the process `home`."""
        if self.spread.is_relayed:
            return Spans.evenly(self.processes, size)
        return self.at(home, size)


def projection(
    sides: Sides, settings: AdaRankGradConfig, rank: int, home: int
) -> Iterator[Request | tuple[Request, ...]]:
    """Requests of a step once the basis is available: P, the residual's norm or P and S, N."""
    norms = (FP32,) if settings.residual in SCALES_ROWS else ()  # one number per row
    columns = (FP32 * rank, *norms)
    yield Request(sides.moment_touch, sides.moment_keep, columns, adds=True)
    if settings.residual == "scaled":
        yield Request(sides.whole(1), sides.whole(1), (FP64,), adds=True)
    N = Request(sides.moment_keep, sides.moment_update, columns)
    if settings.residual != "orthogonalized":
        yield N
        return
    element = (POLAR_TYPES[settings.polar_precision].itemsize,)
    at_home = sides.at(home, sides.spread.elements.size)
    yield Request(sides.moment_keep, sides.moment_touch, columns)
    Q = Request(sides.basis_keep, sides.at(home, sides.spread.basis.size), (element[0] * rank,))
    yield Request(sides.elements_keep, at_home, element), Q
    yield N, Request(at_home, sides.elements_update, element)


def steady(
    sides: Sides, settings: AdaRankGradConfig, rank: int, home: int
) -> Iterator[Request | tuple[Request, ...]]:
    """Requests of a step without a refresh, with a basis of `rank` columns."""
    yield Request(sides.store, sides.basis_touch, (FP32 * rank,))
    yield from projection(sides, settings, rank, home)


def first(
    sides: Sides, settings: AdaRankGradConfig, rank: int, home: int
) -> Iterator[Request | tuple[Request, ...]]:
    """Requests of the first step, which refreshes the basis to `rank` columns; moments are zero.

    Args:
        sides: how the matrix is sharded.
        settings: its settings.
        rank: rank of the new basis.
        home: its home process, as an index into the owners.
    """
    width, size = sketch_width(sides.spread, settings), sides.spread.basis.size
    columns, squares = (FP32 * width,), (FP64 * width,)

    def distributed(columns: tuple[int, ...]) -> Iterator[Request]:
        yield Request(sides.at(home, size), sides.relay(home, size), columns)
        yield Request(sides.relay(home, size), sides.basis_touch, columns)

    def collected(have: Spans, size: int, columns: tuple[int, ...]) -> Iterator[Request]:
        yield Request(have, sides.relay(home, size), columns, adds=True)
        yield Request(sides.relay(home, size), sides.at(home, size), columns)

    image = Request(sides.moment_touch, sides.moment_keep, columns, adds=True)
    yield from collected(sides.basis_touch, size, columns)
    for _ in range(settings.power_passes):
        yield from distributed(columns)
        yield image
        yield Request(sides.moment_keep, sides.moment_touch, columns)
        yield from collected(sides.basis_touch, size, columns)
    yield from distributed(columns)
    yield image
    yield from collected(sides.whole(width), width, squares)
    yield Request(sides.at(home, 1), sides.whole(1), squares)
    yield from distributed((FP32 * rank,))
    yield from projection(sides, settings, rank, home)


def sketch_width(spread: Spread, settings: AdaRankGradConfig) -> int:
    """Number of columns in the sketch of a matrix."""
    short = min(spread.basis.size, spread.moment.size)
    return min(settings.rank_bounds(short)[1] + settings.oversample, short)


class Moved(NamedTuple):
    """Bytes per owner in a round: sent to others, received from them, and the resulting tensors."""

    sent: Counts
    received: Counts
    answer: Counts


Rounds = list[Moved | None]
"""What each request of a matrix transfers; None: nothing, so it takes no round."""


def rounds_of(requests: Iterable[Request | tuple[Request, ...]]) -> Rounds:
    """What the requests of a matrix transfer; those of a tuple are made in one round."""
    rounds: Rounds = []
    for made in requests:
        together = (made,) if isinstance(made, Request) else made
        found = [moved for each in together if (moved := _moved(each)) is not None]
        rounds.append(Moved(*(sum(parts) for parts in zip(*found, strict=True))) if found else None)
    return rounds


def _moved(request: Request) -> Moved | None:
    have, want, row_bytes, adds = request
    if want.are_within(have) and not (adds and sent(have, want, 1).any()):
        return None
    outgoing = [sent(have, want, size) for size in row_bytes]
    incoming = [sent(want, have, size) for size in row_bytes]
    # what comes from one process alone stays where it was received
    together = not adds and np.count_nonzero(have.counts()) == 1
    answer = want.counts() * sum(row_bytes) * (not together)
    return Moved(np.sum(outgoing, 0), np.sum(incoming, 0), answer)


def taken(rounds: Rounds) -> list[Moved]:
    """The rounds in which something is transferred."""
    return [moved for moved in rounds if moved is not None]
