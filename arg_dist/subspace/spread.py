"""The distribution of one matrix over the processes of a group, as plain values.

The gradient ``G`` is oriented as ``moment x basis``: the basis ``Q`` (``basis x rank``) spans one
side, and the projected gradient ``P = G Q`` with its two moments (``moment x rank``) extends along
the other. For a `right` matrix the moment side is G's rows, for a `left` one its columns (G then
denotes the transposed gradient). Both cases thus share one formulation, and a sharding states which
rows of either side a process touches, keeps, and updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from arg_dist.subspace.exchange import (
    Interval,
    Rows,
    Steps,
    even_rows,
    relayed_gather,
    relayed_sum,
)
from arg_dist.subspace.momentum import blocks_of
from arg_dist.subspace.state import OF_TENSOR, SCHEMA, WITH_ROWS, Lies


@dataclass(frozen=True)
class Side:
    """One dimension of a matrix, distributed over the processes.

    Attributes:
        size: length of the dimension.
        touch: rows covered by a process's part of the gradient; they overlap if a row is split
            between processes.
        keep: rows whose state a process keeps; a partition of the dimension, within `touch`.
        update: rows whose weights a process updates.
    """

    size: int
    touch: Rows
    keep: Rows
    update: Rows

    @property
    def processes(self) -> int:
        """Number of processes in the group."""
        return len(self.keep)

    @property
    def kept_rows(self) -> Rows:
        """Rows of the moments that each process keeps."""
        return self.keep

    def counted(self) -> dict[str, Rows]:
        """Rows of each tensor of a tensor's state on each process; every row once."""
        return dict.fromkeys(OF_TENSOR, self.keep)

    def stored(self) -> dict[str, Rows]:
        """Rows of each tensor of a tensor's state that each process holds."""
        return self.counted()


@dataclass(frozen=True)
class Spread:
    """The distribution of one matrix over the processes of its group.

    Attributes:
        moment: the side of the projected gradient and its moments.
        basis: the side that the basis spans.
        elements: the elements of the matrix, in the row-major order of the side that is cut.
        cuts_moment: whether that is the moment side, so that the order is that of
            ``moment x basis``; else that of ``basis x moment``.
        outputs_are_moment: whether the moment side is that of the rows of W in the model.
        store: rows of the basis in each process's state: `basis.keep`, or `basis.touch` if the
            basis is replicated.
        owners: processes that hold a part of the matrix; no others take part.
        home: the owner that orthonormalizes sketches and solves the small eigenproblem, so that
            rounding cannot give the processes different results.
        me: this process's index in the group.
    """

    moment: Side
    basis: Side
    elements: Side
    cuts_moment: bool
    outputs_are_moment: bool
    store: Rows
    owners: tuple[int, ...]
    home: int
    me: int

    @property
    def processes(self) -> int:
        """Number of processes in the group."""
        return len(self.store)

    @property
    def kept_rows(self) -> Rows:
        """Rows of the moments that each process keeps."""
        return self.moment.keep

    def counted(self) -> dict[str, Rows]:
        """Rows of each tensor that its state may have, on each process; every row once."""
        return self._rows(self.moment.keep, self.basis.keep)

    def stored(self) -> dict[str, Rows]:
        """Rows of each tensor that its state may have, which each process holds."""
        return self._rows(self.moment.keep, self.store)

    def _rows(self, moments: Rows, basis: Rows) -> dict[str, Rows]:
        blocks = self.at_home(blocks_of(self.elements.size))
        lie = {Lies.AS_MOMENTS: moments, Lies.AS_BASIS: basis, Lies.AT_HOME: blocks}
        return {key: lie[SCHEMA[key].lies] for key in WITH_ROWS}

    def flat(self, block: Tensor) -> Tensor:
        """``elements.touch``: those of a block ``moment.touch x basis.touch`` that are held."""
        rows = block if self.cuts_moment else block.T
        start, stop = self.elements.touch[self.me]
        first = start // max(1, rows.shape[1]) * rows.shape[1]
        return rows.reshape(-1)[start - first : stop - first]

    def matrix(self, flat: Tensor) -> Tensor:
        """``moment x basis``: a view of all elements of the matrix."""
        if self.cuts_moment:
            return flat.view(self.moment.size, self.basis.size)
        return flat.view(self.basis.size, self.moment.size).T

    def whole(self, size: int) -> Rows:
        """All of `size` rows for every owner, none for the others."""
        owners = frozenset(self.owners)
        return tuple((0, size if i in owners else 0) for i in range(self.processes))

    def at_home(self, size: int) -> Rows:
        """All of `size` rows on the home process, none elsewhere."""
        return tuple((0, size if i == self.home else 0) for i in range(self.processes))

    @property
    def is_relayed(self) -> bool:
        """Whether transfers to and from the home process are relayed through all owners.

        With two owners, relaying gains nothing.
        """
        return len(self.owners) > 2

    @cached_property
    def is_aligned(self) -> bool:
        """Whether every process keeps exactly the moment rows that it touches."""
        return self.moment.keep == self.moment.touch

    def relay(self, size: int) -> Rows:
        """Which of `size` rows each process forwards to or from the home process."""
        return self.shares(size) if self.is_relayed else self.at_home(size)

    def shares(self, size: int) -> Rows:
        """`size` rows split evenly over the owners."""
        parts = dict(zip(self.owners, even_rows(size, len(self.owners)), strict=True))
        return tuple(parts.get(i, (0, 0)) for i in range(self.processes))


def to_home(part: Tensor, have: Rows, size: int, spread: Spread) -> Steps[Tensor]:
    """Sum the partial results of all processes on the home process; no rows elsewhere.

    Args:
        part: ``have[me] x ...``, this process's partial results.
        have: rows that each process contributes to.
        size: number of rows.
        spread: the distribution that defines the home process.
    """
    return relayed_sum(part, have, spread.relay(size), spread.at_home(size), spread.me)


def from_home(part: Tensor, size: int, want: Rows, spread: Spread) -> Steps[Tensor]:
    """Distribute the rows ``want[me]`` of a matrix that the home process holds.

    Args:
        part: ``size x ...`` on the home process, no rows elsewhere.
        size: number of rows.
        want: rows that each process needs.
        spread: the distribution that defines the home process.
    """
    return relayed_gather(part, spread.at_home(size), spread.relay(size), want, spread.me)


def single_process(moment: int, basis: int) -> Spread:
    """The distribution of a matrix that one process holds whole."""

    def whole(size: int) -> Side:
        rows: Rows = ((0, size),)
        return Side(size, rows, rows, rows)

    return Spread(
        moment=whole(moment),
        basis=whole(basis),
        elements=whole(moment * basis),
        cuts_moment=True,
        outputs_are_moment=True,
        store=((0, basis),),
        owners=(0,),
        home=0,
        me=0,
    )


def row_count(interval: Interval) -> int:
    """Number of rows in an interval."""
    return max(0, interval[1] - interval[0])
