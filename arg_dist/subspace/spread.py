"""How one matrix lies over the processes of a group, as plain values.

The gradient ``G`` is looked at as ``moment x basis``: the basis ``Q`` (``basis x rank``) spans one
side, and the projected gradient ``P = G Q`` with its two moments (``moment x rank``) lives on the
other. For a `right` matrix the moments lie along G's rows, for a `left` one along its columns (then
what is called G here is the transposed gradient). Seen so, both sides read alike, and a sharding is
a statement of which rows of either side a process touches, keeps, and updates.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from arg_dist.subspace.exchange import (
    Interval,
    Rows,
    Steps,
    even_rows,
    relayed_gather,
    relayed_sum,
)


@dataclass(frozen=True)
class Side:
    """One dimension of a matrix, spread over the processes.

    Attributes:
        size: length of the dimension.
        touch: rows that a process's part of the gradient reaches; may overlap where a row is cut.
        keep: rows whose state a process keeps; disjoint, together everything, within `touch`.
        update: rows whose weights a process updates.
    """

    size: int
    touch: Rows
    keep: Rows
    update: Rows


@dataclass(frozen=True)
class Spread:
    """How one matrix lies over the processes of its group.

    Attributes:
        moment: the side of the projected gradient and its moments.
        basis: the side that the basis spans.
        store: rows of the basis in each process's state: `basis.keep`, or `basis.touch` where the
            basis is replicated.
        owners: processes that hold a part of the matrix; nobody else takes part.
        home: the owner that orthonormalizes sketches and decides what rounding could decide
            differently elsewhere.
        me: this process's index in the group.
    """

    moment: Side
    basis: Side
    store: Rows
    owners: tuple[int, ...]
    home: int
    me: int

    @property
    def processes(self) -> int:
        """Number of processes in the group."""
        return len(self.store)

    def whole(self, size: int) -> Rows:
        """All of `size` rows for every owner, none for the others."""
        return tuple((0, size if i in self.owners else 0) for i in range(self.processes))

    def at_home(self, size: int) -> Rows:
        """All of `size` rows at the home process, none elsewhere."""
        return tuple((0, size if i == self.home else 0) for i in range(self.processes))

    @property
    def is_relayed(self) -> bool:
        """Whether what the home process collects and hands out goes by way of all owners.

        Between two there would be nothing to gain.
        """
        return len(self.owners) > 2

    def relay(self, size: int) -> Rows:
        """Who passes on which of `size` rows on their way to or from the home process."""
        return self.shares(size) if self.is_relayed else self.at_home(size)

    def shares(self, size: int) -> Rows:
        """`size` rows cut evenly over the owners."""
        parts = dict(zip(self.owners, even_rows(size, len(self.owners)), strict=True))
        return tuple(parts.get(i, (0, 0)) for i in range(self.processes))


def to_home(part: Tensor, have: Rows, size: int, spread: Spread) -> Steps[Tensor]:
    """The sum of everyone's partial results at the home process, no rows elsewhere.

    Args:
        part: ``have[me] x ...``, this process's.
        have: who contributes to which rows.
        size: how many rows there are.
        spread: whose home it is.
    """
    return relayed_sum(part, have, spread.relay(size), spread.at_home(size), spread.me)


def from_home(part: Tensor, size: int, want: Rows, spread: Spread) -> Steps[Tensor]:
    """The rows ``want[me]`` of a matrix that the home process holds.

    Args:
        part: ``size x ...`` at the home process, no rows elsewhere.
        size: how many rows there are.
        want: who needs which rows.
        spread: whose home it is.
    """
    return relayed_gather(part, spread.at_home(size), spread.relay(size), want, spread.me)


def single_process(moment: int, basis: int) -> Spread:
    """The spread of a matrix that one process holds whole."""
    all_moments: Rows = ((0, moment),)
    all_basis: Rows = ((0, basis),)
    return Spread(
        moment=Side(moment, all_moments, all_moments, all_moments),
        basis=Side(basis, all_basis, all_basis, all_basis),
        store=all_basis,
        owners=(0,),
        home=0,
        me=0,
    )


def row_count(interval: Interval) -> int:
    """Number of rows in an interval."""
    return max(0, interval[1] - interval[0])
