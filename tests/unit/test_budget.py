"""Ranks out of one budget: never above it, the best value for the bytes, and no effect if wide."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arg_dist.subspace.budget import Claim, Ranks, allowed_ranks, smallest_bytes

LONGEST = 6
SPECTRA = st.lists(st.floats(0.0, 1.0), min_size=LONGEST, max_size=LONGEST).map(
    lambda values: sorted((value / (sum(values) or 1) for value in values), reverse=True)
)


def claim(name: str, **more) -> Claim:
    chosen = dict(
        smallest=1,
        largest=LONGEST,
        rank=0,
        direction_bytes=10,
        elements=100,
        energy=1.0,
        spectrum=None,
        is_due=True,
    )
    return Claim(name, **{**chosen, **more})


@st.composite
def claims_of(draw, count=4, *, equal=False, fresh=False):
    """Matrices of all kinds; `equal` costs, or all of them `fresh`: known, due, without a rank."""
    found = []
    for i in range(draw(st.integers(1, count))):
        largest = draw(st.integers(1, LONGEST))
        found.append(
            claim(
                f"w{i}",
                smallest=draw(st.integers(1, largest)),
                largest=largest,
                rank=0 if fresh else draw(st.integers(0, largest)),
                direction_bytes=10 if equal else draw(st.integers(1, 20)),
                elements=draw(st.integers(1, 50)),
                energy=1.0 if fresh else draw(st.floats(0.1, 1.0)),
                spectrum=draw(SPECTRA if fresh else st.none() | SPECTRA),
                is_due=fresh or draw(st.booleans()),
            )
        )
    return found


def bytes_of(claims, ranks: Ranks) -> int:
    return sum(ranks[each.name] * each.direction_bytes for each in claims)


def value_of(claims, ranks: Ranks) -> float:
    return sum(sum(each.spectrum[: ranks[each.name]]) * each.elements for each in claims)


def best_value(claims, budget: int) -> float:
    """By looking at every choice of ranks."""
    choices = [range(each.smallest, each.largest + 1) for each in claims]
    names = [each.name for each in claims]
    all_ranks = (dict(zip(names, ranks, strict=True)) for ranks in product(*choices))
    return max(value_of(claims, ranks) for ranks in all_ranks if bytes_of(claims, ranks) <= budget)


@given(claims_of(3, equal=True, fresh=True), st.integers(0, 150))
def test_no_other_ranks_keep_more_energy_where_directions_cost_the_same(claims, more):
    budget = smallest_bytes(claims) + more
    ranks = allowed_ranks(claims, budget)
    assert bytes_of(claims, ranks) <= budget
    assert value_of(claims, ranks) == pytest.approx(best_value(claims, budget))


@given(claims_of(3, fresh=True), st.integers(0, 150))
def test_no_other_ranks_keep_more_by_more_than_a_direction(claims, more):
    budget = smallest_bytes(claims) + more
    ranks = allowed_ranks(claims, budget)
    left = budget - bytes_of(claims, ranks)
    densities = [
        each.spectrum[ranks[each.name]] * each.elements / each.direction_bytes
        for each in claims
        if ranks[each.name] < each.largest
    ]
    assert left >= 0
    # a direction that did not fit was worth more than what fits into the bytes that are left
    worth = max((each.spectrum[0] * each.elements for each in claims), default=0)
    assert value_of(claims, ranks) + worth >= best_value(claims, budget) - 1e-9
    if left >= max(each.direction_bytes for each in claims):
        assert not densities


@given(st.data())
def test_the_budget_holds_whatever_refreshes_in_whatever_order(data):
    claims = data.draw(claims_of())
    budget = data.draw(
        st.integers(0, 300).map(
            lambda more: sum(each.reserved * each.direction_bytes for each in claims) + more
        )
    )
    for _ in range(4):
        ranks = allowed_ranks(claims, budget)
        assert ranks.keys() == {each.name for each in claims if each.is_due}
        after = []
        for each in claims:
            rank, spectrum = each.rank, each.spectrum
            if each.is_due and data.draw(st.booleans()):  # else its gradient was zero
                assert each.smallest <= ranks[each.name] <= each.largest
                rank = data.draw(st.integers(1, ranks[each.name]))
                spectrum = data.draw(SPECTRA)
            more = dict(rank=rank, spectrum=spectrum, is_due=data.draw(st.booleans()))
            after.append(Claim(**{**vars(each), **more}))
        claims = after
        assert sum(each.rank * each.direction_bytes for each in claims) <= budget


@given(claims_of(), st.integers(0, 100))
def test_a_budget_wider_than_all_largest_ranks_changes_nothing(claims, more):
    budget = sum(max(each.largest, each.rank) * each.direction_bytes for each in claims) + more
    assert allowed_ranks(claims, budget) == {
        each.name: each.largest for each in claims if each.is_due
    }


@given(claims_of(), st.integers(0, 200), st.randoms())
def test_the_order_in_which_matrices_are_told_makes_no_difference(claims, more, random):
    budget = smallest_bytes(claims) + more
    expected = allowed_ranks(claims, budget)
    random.shuffle(claims)
    assert allowed_ranks(claims, budget) == expected


@given(claims_of(fresh=True), st.integers(0, 200))
def test_what_all_may_get_together_is_what_each_may_get_alone(claims, more):
    """Nobody has anything yet, so that free bytes bound nobody."""
    budget = smallest_bytes(claims) + more
    together = allowed_ranks(claims, budget)
    for chosen in claims:
        alone = [Claim(**{**vars(each), "is_due": each is chosen}) for each in claims]
        assert allowed_ranks(alone, budget) == {chosen.name: together[chosen.name]}


def test_unknown_spectra_get_the_same_fraction():
    claims = [claim("a", largest=101), claim("b", largest=21), claim("c", largest=11)]
    half = 10 * (51 + 11 + 6)
    assert allowed_ranks(claims, half) == {"a": 51, "b": 11, "c": 6}
    later = [claim("a", largest=101), claim("b", largest=21, is_due=False), claims[2]]
    assert allowed_ranks(later, half) == {"a": 51, "c": 6}  # b's half waits for it


def test_the_sum_is_bounded_by_the_elements_and_the_bytes_too():
    steep = [0.5, 0.3, 0.1, 0.05, 0.03, 0.02]
    two = [claim("large", spectrum=steep, elements=1000), claim("small", spectrum=steep)]
    assert allowed_ranks(two, 70) == {"large": 5, "small": 2}
    two = [claim("dear", spectrum=steep, direction_bytes=30), claim("cheap", spectrum=steep)]
    assert allowed_ranks(two, 100) == {"dear": 2, "cheap": 4}


def test_energy_that_nobody_wants_comes_last():
    steep, flat = [0.9, 0.06, 0.02, 0.01, 0.005, 0.005], [0.02] * 6
    two = [
        claim("content", spectrum=steep, energy=0.9),
        claim("hungry", spectrum=flat, energy=0.9),
    ]
    assert allowed_ranks(two, 70) == {"content": 1, "hungry": 6}
    assert allowed_ranks(two, 90) == {"content": 3, "hungry": 6}


def test_bytes_are_handed_out_once_they_are_free():
    rich = claim("rich", rank=6, spectrum=[0.3, 0.01, 0.01, 0.01, 0.01, 0.01])
    poor = claim("poor", rank=1, spectrum=[0.2, 0.19, 0.18, 0.17, 0.16, 0.1])
    assert allowed_ranks([rich, poor], 70) == {"rich": 1, "poor": 1}
    shrunk = Claim(**{**vars(rich), "rank": 1})
    assert allowed_ranks([shrunk, poor], 70) == {"rich": 1, "poor": 6}


def test_more_than_the_budget_comes_down_and_nobody_grows():
    flat = [1 / 6] * 6
    claims = [claim(name, rank=rank, spectrum=flat) for name, rank in (("a", 6), ("b", 5))]
    ranks = allowed_ranks(claims, 60)
    assert ranks == {"a": 3, "b": 3}


def test_directions_that_no_spectrum_tells_of_come_last():
    """Where max_rank was raised since."""
    two = [claim("a", spectrum=[0.5, 0.1]), claim("b", spectrum=[0.1] * 6)]
    assert allowed_ranks(two, 80) == {"a": 2, "b": 6}
    assert allowed_ranks(two, 100) == {"a": 4, "b": 6}
