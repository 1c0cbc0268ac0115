"""A matrix distributed over the processes of a group: its sharding, and requests for its rows.

The gradient ``G`` is oriented as ``moment x basis``: the basis ``Q`` (``basis x rank``) spans one
side, and the projected gradient ``P = G Q`` with its two moments (``moment x rank``) extends along
the other. For a `right` matrix the moment side is G's rows, for a `left` one its columns (G then
denotes the transposed gradient). Both cases thus share one formulation, and a sharding states which
rows of either side a process touches, keeps, and updates.

A tall matrix is distributed over the processes of a group by *rows*: one half-open interval per
process. A computation that needs other processes is a generator. It yields an :class:`Exchange` (or
a tuple of them) and receives the rows it wants, summed over all processes that hold a part of them.
The drivers in ``arg_dist.sharding`` carry out the requests.

Two requests suffice, both built on one primitive:

* :func:`sum_scatter`: each process receives its rows of the sum (a reduce-scatter);
* :func:`gather`: each process receives the rows it wants of a distributed matrix.

Where many processes send to one, or one to many, :func:`relayed_sum` and :func:`relayed_gather`
relay through all processes, so that no process holds, sends or adds much more than the others.

A request that moves no data is answered immediately and never reaches a driver.

What costs more operators than time for a small matrix, a computation yields as :class:`Work`:
:func:`advance` does it for all matrices of one shape at once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from arg_dist.subspace.codes import blocks_of
from arg_dist.subspace.state import OF_TENSOR, SCHEMA, WITH_ROWS, Lies

Interval = tuple[int, int]
Rows = tuple[Interval, ...]
"""Rows of a tall matrix on each process of a group: one half-open interval per process."""
Block = tuple[Interval, Interval]
"""A rectangle of a matrix: some of its rows, and some of its columns."""

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


FP32_BYTES = 4


class KnownRows(tuple[Interval, ...]):
    """Rows that are looked up in every step: their hash is computed once.

    It would take a millisecond for the rows of some thousand processes.
    """

    def __hash__(self) -> int:
        known: int | None = self.__dict__.get("known")
        if known is None:
            known = self.__dict__["known"] = tuple.__hash__(self)
        return known


ALIGNED = 64
"""Bytes to which torch aligns new tensors; a product may add up in another order elsewhere."""


@dataclass(frozen=True)
class Exchange:
    """Process `i` has partial results for the rows ``have[i]`` and wants the sums of ``want[i]``.

    Attributes:
        part: this process's partial results, ``rows x ...``, first row = row ``have[me][0]``.
        have: rows that each process contributes to.
        want: rows that each process receives.
        stacked: instead of their sum, it wants all contributions, ``contributors x rows x ...``, in
            the order of the processes; each contributes to all of the rows wanted, or to none.
    """

    part: Tensor
    have: Rows
    want: Rows
    stacked: bool = False


Request = Exchange | tuple[Exchange, ...]


@dataclass(frozen=True)
class Work:
    """What matrices of one kind have computed together, in fewer operators than one by one.

    Attributes:
        function: takes a list of each operand, one entry for each matrix, and the options; returns
            a sequence with the result for each matrix.
        operands: of this matrix.
        kind: what must be equal for matrices to be together, beside function and options: shapes.
        options: further arguments, by name.
    """

    function: Callable[..., Sequence[Any]]
    operands: tuple[Any, ...]
    kind: Hashable
    options: tuple[tuple[str, Hashable], ...] = ()


Steps = Generator[Request | Work, Any, T]
"""A computation that yields requests and work, receives answers and results, and returns a `T`."""


def together(
    function: Callable[..., Sequence[Any]], *operands: Any, kind: Hashable, **options: Hashable
) -> Steps[Any]:
    """The result of a :class:`Work`."""
    return (yield Work(function, operands, kind, tuple(options.items())))


def done(works: Sequence[Work]) -> Sequence[Any]:
    """The results of works of one kind."""
    operands = zip(*(work.operands for work in works), strict=True)
    return works[0].function(*map(list, operands), **dict(works[0].options))


def advance(
    computations: Mapping[K, Steps[T]],
    answers: dict[K, Any],
    finish: Callable[[K, T], None],
) -> dict[K, Request]:
    """Let computations go on until they need other processes, or have a result.

    Args:
        computations: the computations.
        answers: to the last request of each one that is to go on; None for one that begins. They
            are taken out, so that a computation can free its own.
        finish: called with each result.

    Returns:
        The requests, in the order of the answers.
    """
    order, requests = list(answers), dict[K, Request]()
    while answers:
        works: dict[Hashable, dict[K, Work]] = {}
        for key in list(answers):
            try:
                asked = computations[key].send(answers.pop(key))
            except StopIteration as finished:
                finish(key, finished.value)
                continue
            if isinstance(asked, Work):
                kind = asked.function, asked.kind, asked.options
                works.setdefault(kind, {})[key] = asked
            else:
                requests[key] = asked
        while works:  # nothing remains of it when the computations go on
            _, alike = works.popitem()
            keys = list(alike)
            answers.update(zip(keys, done(list(alike.values())), strict=True))
            del alike
    return {key: requests[key] for key in order if key in requests}


def known_rows(rows: Rows) -> Rows:
    """The same rows, whose hash is computed once; itself if they are of such a kind."""
    return _one_of_equal(KnownRows(rows)) if type(rows) is tuple else rows


@lru_cache(maxsize=65536)
def _one_of_equal(rows: KnownRows) -> KnownRows:
    """One object for all equal rows: comparing two of them takes as long as hashing."""
    return rows


def exchanges_of(request: Request | Work) -> tuple[Exchange, ...]:
    """The exchanges of a request; work has none."""
    if isinstance(request, Work):
        return ()
    return request if isinstance(request, tuple) else (request,)


def intersect(a: Interval, b: Interval) -> Interval:
    """The common rows of two intervals; ``(x, x)`` if they are disjoint."""
    low, high = max(a[0], b[0]), min(a[1], b[1])
    return (low, max(low, high))


def contributors(have: Rows, wanted: Interval) -> int:
    """Number of processes that have some of the rows wanted."""
    return sum(low < high for low, high in (intersect(held, wanted) for held in have))


def is_within(inner: Interval, outer: Interval) -> bool:
    """Whether every row of `inner` is a row of `outer`; an empty interval is within any other."""
    return inner[0] >= inner[1] or (outer[0] <= inner[0] and inner[1] <= outer[1])


def even_rows(size: int, processes: int) -> Rows:
    """Split `size` rows into `processes` parts that differ by at most one row."""
    bounds = [size * i // processes for i in range(processes + 1)]
    return tuple(pairwise(bounds))


def even_part(rows: Interval, part: int, parts: int) -> Interval:
    """One of the even parts of some rows."""
    low, high = rows
    first, last = even_rows(high - low, parts)[part]
    return low + first, low + last


@lru_cache(maxsize=65536)
def _all_rows_are_local(have: Rows, want: Rows) -> bool:
    return all(is_within(w, h) for h, w in zip(have, want, strict=True))


@lru_cache(maxsize=65536)
def _no_sums_are_needed(have: Rows, want: Rows) -> bool:
    """Whether no process has rows that another one wants, if each has those that it wants."""
    held = sorted(rows for rows in have if rows[0] < rows[1])
    # apart from each other, they are apart from what lies within the others
    if all(before[1] <= after[0] for before, after in pairwise(held)):
        return True
    return all(
        i == j or low >= high
        for i, wanted in enumerate(want)
        for j, other in enumerate(have)
        for low, high in [intersect(wanted, other)]
    )


def tile(rows: Sequence[Interval], wanted: Interval) -> bool:
    """Whether the intervals are consecutive and cover exactly the rows wanted."""
    end = wanted[0]
    for low, high in rows:
        if low != end:
            return False
        end = high
    return end == wanted[1]


def add_up(exchange: Exchange, me: int, contributions: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Sum the contributions to the rows that process `me` wants, in the order of processes.

    Args:
        exchange: the request.
        me: index of the receiving process.
        contributions: ``(first row, rows)`` of each contributing process, `me` included.
    """
    low, high = exchange.want[me]
    if exchange.stacked:
        parts = [part for _, part in contributions]
        none = exchange.part.new_zeros(0, max(0, high - low), *exchange.part.shape[1:])
        return torch.stack(parts) if parts else none
    if not contributions:
        return exchange.part.new_zeros(max(0, high - low), *exchange.part.shape[1:])
    if tile([(start, start + part.shape[0]) for start, part in contributions], (low, high)):
        return put_together([part for _, part in contributions])
    if all((start, len(part)) == (low, high - low) for start, part in contributions):
        return summed_in_order(torch.stack([part for _, part in contributions]))
    result = exchange.part.new_zeros(high - low, *exchange.part.shape[1:])
    for start, part in contributions:
        result[start - low : start - low + part.shape[0]] += part
    return result


def summed_in_order(contributions: Tensor) -> Tensor:
    """``rows x ...``: the sum of ``processes x rows x ...``, in the same order everywhere."""
    return contributions.sum(0, dtype=contributions.dtype)


def put_together(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the parts; contiguous and aligned, as both decide the order of later sums."""
    if len(parts) > 1:
        return torch.cat(list(parts))
    whole = parts[0].contiguous()
    return whole if whole.data_ptr() % ALIGNED == 0 else whole.clone()


def select_rows(part: Tensor, have: Interval, want: Interval) -> Tensor:
    """The rows `want` of a matrix, as a view of a part that has the rows `have`."""
    if have == want:
        return part
    low, high = want if want[0] < want[1] else (have[0], have[0])
    return part[low - have[0] : high - have[0]]


def gather(part: Tensor, have: Rows, want: Rows, me: int) -> Steps[Tensor]:
    """Gather the rows ``want[me]`` of a matrix of which process `i` holds the rows ``have[i]``.

    Args:
        part: ``have[me] x ...``, this process's rows.
        have: rows that each process holds; disjoint, unless each already holds what it wants.
        want: rows that each process needs.
        me: this process's index in the group.
    """
    if _all_rows_are_local(have, want):
        return select_rows(part, have[me], want[me])
    rows: Tensor = yield Exchange(part, have, want)
    return rows


def gather_each(parts: Sequence[tuple[Tensor, Rows, Rows]], me: int) -> Steps[list[Tensor]]:
    """A :func:`gather` of each ``(part, have, want)``, in one request."""
    moved = tuple(Exchange(*each) for each in parts if not _all_rows_are_local(*each[1:]))
    answers = iter((yield moved) if moved else ())
    return [
        select_rows(part, have[me], want[me]) if _all_rows_are_local(have, want) else next(answers)
        for part, have, want in parts
    ]


def sum_scatter(part: Tensor, have: Rows, want: Rows, me: int) -> Steps[Tensor]:
    """Sum partial results over all processes; return the rows ``want[me]``.

    Args:
        part: ``have[me] x ...``, this process's partial results.
        have: rows that each process contributes to; may overlap.
        want: rows that each process needs.
        me: this process's index in the group.
    """
    if _all_rows_are_local(have, want) and _no_sums_are_needed(have, want):
        return select_rows(part, have[me], want[me])
    rows: Tensor = yield Exchange(part, have, want)
    return rows


def sum_scatter_both(
    parts: tuple[Tensor, Tensor], have: Rows, want: Rows, me: int
) -> Steps[tuple[Tensor, Tensor]]:
    """Two :func:`sum_scatter` over the same rows, in one request."""
    if _all_rows_are_local(have, want) and _no_sums_are_needed(have, want):
        return tuple(select_rows(part, have[me], want[me]) for part in parts)  # type: ignore[return-value]
    both: tuple[Tensor, Tensor] = yield tuple(Exchange(part, have, want) for part in parts)
    return both


def relayed_sum(part: Tensor, have: Rows, shares: Rows, want: Rows, me: int) -> Steps[Tensor]:
    """:func:`sum_scatter` in two stages: each process sums its share of the rows and forwards it.

    Args:
        part: ``have[me] x ...``, this process's partial results.
        have: rows that each process contributes to; may overlap.
        shares: rows that each process sums and forwards; disjoint.
        want: rows that each process needs.
        me: this process's index in the group.
    """
    mine = yield from sum_scatter(part, have, shares, me)
    del part  # free it during the second stage
    return (yield from gather(mine, shares, want, me))


def relayed_gather(part: Tensor, have: Rows, shares: Rows, want: Rows, me: int) -> Steps[Tensor]:
    """:func:`gather` in two stages: each process receives one share of the rows and forwards it.

    Args:
        part: ``have[me] x ...``, this process's rows.
        have: rows that each process holds; disjoint.
        shares: rows that each process forwards; disjoint.
        want: rows that each process needs.
        me: this process's index in the group.
    """
    mine = yield from gather(part, have, shares, me)
    return (yield from gather(mine, shares, want, me))


# -- the sharding of one matrix -------------------------------------------------------------------


@dataclass(frozen=True)
class DimensionSharding:
    """One dimension of a matrix, distributed over the processes.

    Attributes:
        size: length of the dimension.
        touch: rows covered by a process's part of the gradient; they overlap if a row is split
            between processes.
        keep: rows whose state a process keeps; a partition of the dimension, within `touch`.
        update: rows whose weights a process updates.
        terms: number of gradients of which that of a tensor is the mean, :class:`Terms`.
    """

    size: int
    touch: Rows
    keep: Rows
    update: Rows
    terms: int = 1

    def __post_init__(self) -> None:
        for name in ("touch", "keep", "update"):
            object.__setattr__(self, name, known_rows(getattr(self, name)))

    @property
    def processes(self) -> int:
        """Number of processes in the group."""
        return len(self.keep)

    @property
    def kept_rows(self) -> Rows:
        """Rows of the moments that each process keeps."""
        return self.keep

    @cached_property
    def is_shared(self) -> bool:
        """Whether its step involves several processes."""
        return self.keep != self.update

    @cached_property
    def most_touched(self) -> int:
        """Rows of the process that touches most."""
        return max(map(row_count, self.touch))

    @cached_property
    def most_updated(self) -> int:
        """Rows of the process that updates most."""
        return max(map(row_count, self.update))

    def counted(self) -> dict[str, Rows]:
        """Rows of each tensor of a tensor's state on each process; every row once."""
        return dict.fromkeys(OF_TENSOR, self.keep)

    def stored(self) -> dict[str, Rows]:
        """Rows of each tensor of a tensor's state that each process holds."""
        return self.counted()


@dataclass(frozen=True)
class MatrixSharding:
    """The distribution of one matrix over the processes of its group.

    Attributes:
        moment: the side of the projected gradient and its moments.
        basis: the side that the basis spans.
        elements: the elements of the matrix, in the row-major order of the side that is cut, or
            block after block.
        cuts_moment: whether that is the moment side, so that the order is that of
            ``moment x basis``; else that of ``basis x moment``.
        outputs_are_moment: whether the moment side is that of the rows of W in the model.
        store: rows of the basis in each process's state: `basis.keep`, or `basis.touch` if the
            basis is replicated.
        owners: processes that hold a part of the matrix; no others take part.
        home: the owner that orthonormalizes sketches and solves the small eigenproblem, so that
            rounding cannot give the processes different results.
        me: this process's index in the group.
        terms: set if several copies of the model have a gradient each, whose mean is not formed;
            then the processes that touch the same rows keep an even share of them each.
        blocks: if both sides are cut, the blocks of ``moment x basis`` in the order of their
            elements, each of them row-major; else empty.
    """

    moment: DimensionSharding
    basis: DimensionSharding
    elements: DimensionSharding
    cuts_moment: bool
    outputs_are_moment: bool
    store: Rows
    owners: tuple[int, ...]
    home: int
    me: int
    terms: Terms | None = None
    blocks: tuple[Block, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "store", known_rows(self.store))

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
        if self.blocks:
            return block.reshape(-1)
        rows = block if self.cuts_moment else block.T
        start, stop = self.elements.touch[self.me]
        first = start // max(1, rows.shape[1]) * rows.shape[1]
        return rows.reshape(-1)[start - first : stop - first]

    def matrix(self, flat: Tensor) -> Tensor:
        """``moment x basis``: all elements of the matrix; a view, unless they lie in blocks."""
        if self.blocks:
            whole = flat.new_empty(self.moment.size, self.basis.size)
            sizes = [row_count(rows) * row_count(columns) for rows, columns in self.blocks]
            for (rows, columns), part in zip(self.blocks, torch.split(flat, sizes), strict=True):
                there = whole[slice(*rows), slice(*columns)]
                there.copy_(part.view(there.shape))
            return whole
        if self.cuts_moment:
            return flat.view(self.moment.size, self.basis.size)
        return flat.view(self.basis.size, self.moment.size).T

    def flattened(self, matrix: Tensor) -> Tensor:
        """``elements``: those of ``moment x basis``, the inverse of :meth:`matrix`."""
        if self.blocks:
            parts = [matrix[slice(*rows), slice(*columns)] for rows, columns in self.blocks]
            return torch.cat([part.reshape(-1) for part in parts])
        return (matrix if self.cuts_moment else matrix.T).contiguous().view(-1)

    def whole(self, size: int) -> Rows:
        """All of `size` rows for every owner, none for the others."""
        return _rows_of(self.owners, size, self.processes)

    def at_home(self, size: int) -> Rows:
        """All of `size` rows on the home process, none elsewhere."""
        return _rows_at(self.home, size, self.processes)

    @property
    def is_shared(self) -> bool:
        """Whether its step involves several processes."""
        return len(self.owners) > 1

    @property
    def is_relayed(self) -> bool:
        """Whether transfers to and from the home process are relayed through all owners.

        With two owners, relaying gains nothing.
        """
        return len(self.owners) > 2

    @cached_property
    def is_replicated(self) -> bool:
        """Whether every process updates the whole matrix."""
        return len(set(self.elements.update)) == 1

    @property
    def cut_side(self) -> DimensionSharding:
        """The side that is cut."""
        return self.moment if self.cuts_moment else self.basis

    @cached_property
    def is_cut_in_whole_rows(self) -> bool:
        """Whether no row of the side that is cut is touched by two processes."""
        return self.terms is None and self.cut_side.keep == self.cut_side.touch

    @cached_property
    def is_cut_in_shares(self) -> bool:
        """Whether each owner touches its even share of the rows of the side that is cut."""
        return self.cut_side.touch == self.shares(self.cut_side.size)

    @cached_property
    def is_stored_once(self) -> bool:
        """Whether each row of the basis is in the state of one process."""
        return self.store == self.basis.keep

    @cached_property
    def decided_at_home(self) -> MatrixSharding:
        """The sharding of something at home that has all elements, for which all of Q is wanted."""
        everything, size = self.at_home(self.elements.size), self.basis.size
        has_basis = self.basis.touch[self.home] == (0, size)
        kept = self.at_home(size) if has_basis else self.basis.keep
        return replace(
            self,
            elements=replace(self.elements, keep=everything),
            basis=replace(self.basis, keep=kept),
        )

    def relay(self, size: int) -> Rows:
        """Which of `size` rows each process forwards to or from the home process."""
        return self.shares(size) if self.is_relayed else self.at_home(size)

    def shares(self, size: int) -> Rows:
        """`size` rows split evenly over the owners."""
        return _shares_of(self.owners, size, self.processes)


@dataclass(frozen=True)
class Terms:
    """Of a gradient that is the mean of terms, one in each of several copies of the model.

    Attributes:
        count: number of terms.
        alone: the sharding of a matrix that this process holds whole, for which no other process is
            needed.
        copy_of: in which copy each process holds a part, or all of it.
        averaged: the sharding of the mean, once every process has formed it; None if the copies
            themselves are sharded.
    """

    count: int
    alone: MatrixSharding
    copy_of: tuple[int, ...]
    averaged: MatrixSharding | None = None

    def within_copies(self, rows: Rows, size: int) -> Rows:
        """Rows of which each copy has `size` of its own, so that sums are over one copy only."""
        return tuple(
            (low + i * size, high + i * size)
            for (low, high), i in zip(rows, self.copy_of, strict=True)
        )


@lru_cache(maxsize=65536)
def _rows_at(home: int, size: int, processes: int) -> Rows:
    return known_rows(tuple((0, size if i == home else 0) for i in range(processes)))


@lru_cache(maxsize=4096)
def _rows_of(owners: tuple[int, ...], size: int, processes: int) -> Rows:
    these = frozenset(owners)
    return known_rows(tuple((0, size if i in these else 0) for i in range(processes)))


@lru_cache(maxsize=4096)
def _shares_of(owners: tuple[int, ...], size: int, processes: int) -> Rows:
    parts = dict(zip(owners, even_rows(size, len(owners)), strict=True))
    return known_rows(tuple(parts.get(i, (0, 0)) for i in range(processes)))


def to_home(part: Tensor, have: Rows, size: int, sharding: MatrixSharding) -> Steps[Tensor]:
    """Sum the partial results of all processes on the home process; no rows elsewhere.

    Args:
        part: ``have[me] x ...``, this process's partial results.
        have: rows that each process contributes to.
        size: number of rows.
        sharding: the distribution that defines the home process.
    """
    return relayed_sum(part, have, sharding.relay(size), sharding.at_home(size), sharding.me)


def from_home(part: Tensor, size: int, want: Rows, sharding: MatrixSharding) -> Steps[Tensor]:
    """Distribute the rows ``want[me]`` of a matrix that the home process holds.

    Args:
        part: ``size x ...`` on the home process, no rows elsewhere.
        size: number of rows.
        want: rows that each process needs.
        sharding: the distribution that defines the home process.
    """
    return relayed_gather(part, sharding.at_home(size), sharding.relay(size), want, sharding.me)


def single_process(
    moment: int,
    basis: int,
    *,
    outputs_are_moment: bool = True,
    me: int = 0,
    processes: int = 1,
) -> MatrixSharding:
    """The distribution of a matrix that one process holds whole, and of which others hold nothing.

    Args:
        moment: size of the side of the moments.
        basis: size of the side that the basis spans.
        outputs_are_moment: as of the sharding.
        me: index of that process.
        processes: number of processes in the group.
    """

    def whole(size: int) -> DimensionSharding:
        rows = _rows_at(me, size, processes)
        return DimensionSharding(size, rows, rows, rows)

    return MatrixSharding(
        moment=whole(moment),
        basis=whole(basis),
        elements=whole(moment * basis),
        cuts_moment=True,
        outputs_are_moment=outputs_are_moment,
        store=_rows_at(me, basis, processes),
        owners=(me,),
        home=me,
        me=me,
    )


def row_count(interval: Interval) -> int:
    """Number of rows in an interval."""
    return max(0, interval[1] - interval[0])
