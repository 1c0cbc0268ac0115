"""Row intervals of a tall matrix over thousands of processes, as arrays, and their exchange volume.

The planning counterpart of :mod:`arg_dist.subspace.distributed`: a process sends what
:class:`arg_dist.sharding.communicator.Communicator` would pack for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from arg_dist.sharding.transfers import ALIGNMENT
from arg_dist.subspace.distributed import Rows

Counts = npt.NDArray[np.int64]
"""One integer per process."""


@dataclass(frozen=True, eq=False)
class Spans:
    """Half-open intervals of rows, one per process; empty where both ends are equal.

    Attributes:
        low: first row of each process.
        high: one past the last row of each process.
    """

    low: Counts
    high: Counts

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(rows: Rows) -> Spans:
        """The same intervals as arrays."""
        ends = np.array(rows, dtype=np.int64).reshape(-1, 2)
        return Spans(ends[:, 0], ends[:, 1])

    @staticmethod
    def at(process: int, processes: int, size: int) -> Spans:
        """All rows on one process, none on the others."""
        high = np.zeros(processes, np.int64)
        high[process] = size
        return Spans(np.zeros(processes, np.int64), high)

    def divided(self, parts: int) -> list[Spans]:
        """Those of equally many processes each."""
        each = zip(np.split(self.low, parts), np.split(self.high, parts), strict=True)
        return [Spans(*ends) for ends in each]

    def counts(self) -> Counts:
        """Number of rows of each process."""
        counts: Counts = np.maximum(self.high - self.low, 0)
        return counts

    @cached_property
    def distinct(self) -> tuple[Spans, Counts]:
        """The distinct non-empty intervals, sorted, and each process's index into them or -1."""
        some = np.flatnonzero(self.low < self.high)
        low, high = self.low[some], self.high[some]
        _, which, inverse = np.unique(
            low * (high.max(initial=0) + 1) + high, return_index=True, return_inverse=True
        )
        place = np.full(len(self.low), -1, np.int64)
        place[some] = inverse
        return Spans(low[which], high[which]), place


def box_counts(boxes: Sequence[Rows]) -> Counts:
    """Number of elements in the box of each process."""
    counts: Counts = np.prod([Spans.of(rows).counts() for rows in boxes], 0)
    return counts


def sent(have: Spans, want: Spans, row_bytes: int) -> Counts:
    """Padded bytes that each process sends: its rows in `have` that other processes `want`.

    Any two intervals within `have`, or within `want`, must be equal or start and end in the same
    order.
    """
    mine, place = have.distinct
    theirs, theirs_place = want.distinct
    wanting = np.bincount(theirs_place[theirs_place >= 0], minlength=len(theirs.low))
    # the intervals that overlap a given one are consecutive in row order
    first = np.searchsorted(theirs.high, mine.low, side="right")
    last = np.maximum(np.searchsorted(theirs.low, mine.high, side="left"), first)
    length = last - first
    source = np.repeat(np.arange(len(mine.low)), length)
    target = np.arange(length.sum()) - np.repeat(length.cumsum() - length, length) + first[source]
    common = np.minimum(mine.high[source], theirs.high[target])
    common -= np.maximum(mine.low[source], theirs.low[target])
    total = np.zeros(len(mine.low) + 1, np.int64)  # the last entry is for processes without rows
    np.add.at(total, source, padded(common * row_bytes) * wanting[target])
    return total[place] - padded(_common(have, want) * row_bytes)


def padded(size: Counts) -> Counts:
    """Bytes that tensors of `size` bytes occupy in a message."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _common(have: Spans, want: Spans) -> Counts:
    """Number of rows that each process both has and wants."""
    rows: Counts = np.minimum(have.high, want.high) - np.maximum(have.low, want.low)
    return rows.clip(0)
