"""Ranks of all matrices out of one budget: bytes go where they keep the most energy.

After Adam's normalization every matrix's update has energy in proportion to its elements, so a
direction is worth its share of ``||G||_F^2`` times the matrix's elements, and costs a column of the
basis and of both moments. As shares fall from one direction to the next, taking the best value for
its bytes again and again is the best choice for the bytes taken.

Nothing here sends anything: on the same claims, every process decides the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

STEPS = 2**20
"""Fractions of the way from one rank to another are counted in so many steps."""


@dataclass(frozen=True)
class Claim:
    """What one matrix asks of the budget.

    Attributes:
        name: the matrix's name.
        smallest: rank that it always gets.
        largest: rank that it never exceeds.
        rank: present rank; 0 before its first basis.
        direction_bytes: bytes that one direction takes, on all processes together.
        elements: its number of elements.
        energy: share of ``||G||_F^2`` that it wants to keep.
        spectrum: share of ``||G||_F^2`` of each leading direction, descending, at the last refresh;
            None if it is not known.
        is_due: whether it may get a new basis now.
    """

    name: str
    smallest: int
    largest: int
    rank: int
    direction_bytes: int
    elements: int
    energy: float
    spectrum: Sequence[float] | None
    is_due: bool

    @property
    def reserved(self) -> int:
        """Rank whose bytes nobody else gets: what it has, and the smallest one in any case."""
        return max(self.rank, self.smallest)


Ranks = dict[str, int]
"""A rank for each matrix, by name."""


def smallest_bytes(claims: Sequence[Claim]) -> int:
    """Bytes that all matrices together take at their smallest ranks."""
    return sum(claim.smallest * claim.direction_bytes for claim in claims)


def allowed_ranks(claims: Sequence[Claim], budget: int) -> Ranks:
    """The largest rank that each matrix which is due may get now.

    Bounded by its share in the best distribution over all matrices, and by the bytes that are free
    now: what another matrix is to give up is not handed out before it has. So the bytes stay within
    the budget whichever of these matrices then refresh, in whatever order. Only where more is taken
    already (another budget was in force), nobody grows, and refreshes bring it down.

    Args:
        claims: all matrices, with names that differ.
        budget: bytes for all of them together; no less than :func:`smallest_bytes`.
    """
    claims = sorted(claims, key=lambda claim: claim.name)
    due = [claim for claim in claims if claim.is_due]
    at_most = sum(max(claim.rank, claim.largest) * claim.direction_bytes for claim in claims)
    if at_most <= budget:
        return {claim.name: claim.largest for claim in due}
    target = _distribute(claims, budget)
    free = budget - sum(claim.reserved * claim.direction_bytes for claim in claims)
    now = {claim.name: claim.reserved for claim in claims}
    wanted = {name: max(rank, target[name]) for name, rank in now.items()}
    unknown = [claim for claim in due if claim.spectrum is None]
    known = [claim for claim in due if claim.spectrum is not None]
    evenly = _evenly(unknown, now, wanted, free)
    free -= _growth_bytes(unknown, now, evenly)
    now |= evenly | _by_energy(known, now, wanted, free)
    return {claim.name: min(now[claim.name], target[claim.name]) for claim in due}


def _distribute(claims: Sequence[Claim], budget: int) -> Ranks:
    """The best distribution over all matrices, as if all of them refreshed now.

    A matrix whose spectrum is not known gets the fraction of its largest rank that all would get.
    """
    smallest = {claim.name: claim.smallest for claim in claims}
    largest = {claim.name: claim.largest for claim in claims}
    free = budget - smallest_bytes(claims)
    unknown = [claim for claim in claims if claim.spectrum is None]
    known = [claim for claim in claims if claim.spectrum is not None]
    evenly = _evenly(claims, smallest, largest, free)
    evenly = {claim.name: evenly[claim.name] for claim in unknown}
    free -= _growth_bytes(unknown, smallest, evenly)
    return evenly | _by_energy(known, smallest, largest, free)


def _by_energy(
    claims: Sequence[Claim], low: Mapping[str, int], high: Mapping[str, int], free: int
) -> Ranks:
    """Ranks between `low` and `high` by energy per byte, with `free` bytes beyond those of `low`.

    Directions beyond the energy that a matrix wants come after all that somebody does want.
    """
    offers = []
    for place, claim in enumerate(claims):
        assert claim.spectrum is not None
        kept = sum(claim.spectrum[: low[claim.name]])
        for index in range(low[claim.name], high[claim.name]):
            share = claim.spectrum[index] if index < len(claim.spectrum) else 0.0
            value = share * claim.elements / claim.direction_bytes
            offers.append((kept >= claim.energy, -value, index, place))
            kept += share
    ranks = {claim.name: low[claim.name] for claim in claims}
    for _, _, index, place in sorted(offers):
        claim = claims[place]
        # what one direction was too large for is left to smaller ones, never to its own followers
        if ranks[claim.name] == index and claim.direction_bytes <= free:
            ranks[claim.name] += 1
            free -= claim.direction_bytes
    return ranks


def _evenly(
    claims: Sequence[Claim], low: Mapping[str, int], high: Mapping[str, int], free: int
) -> Ranks:
    """The same fraction of the way from `low` to `high` for all, as large as `free` bytes allow."""

    def ranks(steps: int) -> Ranks:
        return {
            claim.name: low[claim.name] + steps * (high[claim.name] - low[claim.name]) // STEPS
            for claim in claims
        }

    return ranks(_largest(lambda steps: _growth_bytes(claims, low, ranks(steps)) <= free))


def _growth_bytes(claims: Sequence[Claim], low: Mapping[str, int], ranks: Mapping[str, int]) -> int:
    return sum((ranks[claim.name] - low[claim.name]) * claim.direction_bytes for claim in claims)


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest of ``0 .. STEPS`` that fits, where all below it do; 0 if none does."""
    low, beyond = 0, STEPS + 1
    while beyond - low > 1:
        middle = (low + beyond) // 2
        low, beyond = (middle, beyond) if fits(middle) else (low, middle)
    return low
