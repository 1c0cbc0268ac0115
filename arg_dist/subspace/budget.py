"""Ranks of all matrices from one byte budget, allocated by energy per byte.

After Adam's normalization, the energy of a matrix's update is proportional to its number of
elements. The value of a direction is therefore its share of ``||G||_F^2`` times the number of
elements, and its cost one column of the basis and of both moments. Since shares descend from one
direction to the next, greedily taking the best value per byte is optimal for the bytes taken.

Nothing here communicates: from equal claims, every process computes equal ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

STEPS = 2**20
"""Resolution of the fraction of the way from one rank to another."""


@dataclass(frozen=True)
class Claim:
    """One matrix's claim on the budget.

    Attributes:
        name: the matrix's name.
        smallest: guaranteed rank.
        largest: maximum rank.
        rank: present rank; 0 before the first basis.
        direction_bytes: bytes of one direction, on all processes together.
        elements: number of elements of the matrix.
        energy: share of ``||G||_F^2`` to keep.
        spectrum: share of ``||G||_F^2`` of each leading direction, descending, at the last refresh;
            None if unknown.
        is_due: whether it may refresh now.
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
        """Rank whose bytes are reserved for this matrix: the present one, at least the smallest."""
        return max(self.rank, self.smallest)


Ranks = dict[str, int]
"""A rank for each matrix, by name."""


def smallest_bytes(claims: Sequence[Claim]) -> int:
    """Bytes of all matrices together at their smallest ranks."""
    return sum(claim.smallest * claim.direction_bytes for claim in claims)


def allowed_ranks(claims: Sequence[Claim], budget: int) -> Ranks:
    """Largest rank permitted now for each matrix that is due for a refresh.

    Bounded by the matrix's share in the best distribution over all matrices, and by the bytes free
    now: bytes that another matrix has yet to give up are not allotted. The total thus stays within
    the budget whichever of these matrices refresh, in any order. If the total already exceeds the
    budget (a larger one was in force before), no matrix grows, and refreshes reduce the total.

    Args:
        claims: the claims of all matrices, with distinct names.
        budget: bytes for all of them together; at least :func:`smallest_bytes`.
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

    A matrix with unknown spectrum gets the fraction that an even distribution over all would give.
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
    """Ranks between `low` and `high` by energy per byte, with `free` bytes in addition to `low`'s.

    Directions in excess of a matrix's target energy come after all directions within a target.
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
        # bytes too few for one direction go to smaller ones, but never to later ones of its matrix
        if ranks[claim.name] == index and claim.direction_bytes <= free:
            ranks[claim.name] += 1
            free -= claim.direction_bytes
    return ranks


def _evenly(
    claims: Sequence[Claim], low: Mapping[str, int], high: Mapping[str, int], free: int
) -> Ranks:
    """Ranks at one fraction of the way from `low` to `high`, the largest that `free` allows."""

    def ranks(steps: int) -> Ranks:
        return {
            claim.name: low[claim.name] + steps * (high[claim.name] - low[claim.name]) // STEPS
            for claim in claims
        }

    return ranks(_largest(lambda steps: _growth_bytes(claims, low, ranks(steps)) <= free))


def _growth_bytes(claims: Sequence[Claim], low: Mapping[str, int], ranks: Mapping[str, int]) -> int:
    return sum((ranks[claim.name] - low[claim.name]) * claim.direction_bytes for claim in claims)


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest of ``0 .. STEPS`` that fits, by bisection (`fits` is monotone); 0 if none."""
    low, beyond = 0, STEPS + 1
    while beyond - low > 1:
        middle = (low + beyond) // 2
        low, beyond = (middle, beyond) if fits(middle) else (low, middle)
    return low
