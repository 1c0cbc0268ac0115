"""Intervals of rows, and requests that need nobody else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import whole_numbers

from arg_dist.sharding.drivers import run_collective, run_local, run_lockstep
from arg_dist.subspace.distributed import (
    Exchange,
    add_up,
    even_rows,
    gather,
    intersect,
    is_within,
    relayed_sum,
    sum_scatter,
)

intervals = st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted).map(tuple)
WHOLE = ((0, 4), (0, 4))
HALVES = ((0, 2), (2, 4))


@given(intervals, intervals)
def test_the_intersection_has_the_rows_of_both(a, b):
    assert set(range(*intersect(a, b))) == set(range(*a)) & set(range(*b))


@given(intervals, intervals)
def test_within_means_every_row(inner, outer):
    assert is_within(inner, outer) == (set(range(*inner)) <= set(range(*outer)))


@given(st.integers(0, 40), st.integers(1, 9))
def test_even_rows_cover_everything_once_in_like_parts(size, processes):
    parts = even_rows(size, processes)
    assert [row for part in parts for row in range(*part)] == list(range(size))
    lengths = [high - low for low, high in parts]
    assert len(parts) == processes and max(lengths) - min(lengths) <= 1


def test_overlapping_contributions_are_added_row_by_row():
    exchange = Exchange(torch.zeros(0, 2), ((0, 3), (2, 5)), ((1, 4), (0, 0)))
    first, second = torch.ones(2, 2), torch.full((2, 2), 10.0)
    added = add_up(exchange, 0, [(1, first), (2, second)])
    assert added.tolist() == [[1, 1], [11, 11], [10, 10]]


def asks(steps) -> bool:
    """Whether a computation needs anybody else."""
    try:
        next(steps)
    except StopIteration:
        return False
    return True


@pytest.mark.parametrize(
    ("request_", "have", "want", "expected"),
    [
        (gather, WHOLE, HALVES, False),
        (gather, HALVES, HALVES, False),
        (gather, HALVES, WHOLE, True),
        (gather, ((0, 4), (0, 0)), ((1, 3), (0, 0)), False),
        (sum_scatter, HALVES, HALVES, False),
        (sum_scatter, WHOLE, HALVES, True),
        (sum_scatter, ((0, 4), (0, 0)), ((0, 4), (0, 0)), False),
    ],
)
def test_what_moves_nothing_is_answered_on_the_spot(request_, have, want, expected):
    low, high = have[0]
    part = whole_numbers(4, 3)[low:high]
    assert asks(request_(part, have, want, 0)) is expected
    if not expected:
        low, high = want[0]
        assert torch.equal(run_local(request_(part, have, want, 0)), whole_numbers(4, 3)[low:high])


def test_one_process_sums_with_nobody():
    part = whole_numbers(4, 3)
    assert torch.equal(run_local(relayed_sum(part, *[((0, 4),)] * 3, 0)), part)


def ask(times: int):
    for _ in range(times):
        yield Exchange(torch.ones(1), ((0, 1),) * 2, ((0, 1),) * 2)
    return times


class Echo:
    """A communicator that answers with what was sent."""

    def begin(self, exchanges, words):
        return lambda: [exchange.part for exchange in exchanges]


def test_a_collective_run_ends_all_computations_within_the_rounds():
    assert run_collective([ask(2), ask(0), ask(3)], Echo(), rounds=3) == [2, 0, 3]


def test_a_collective_run_raises_where_more_rounds_are_asked_than_agreed():
    with pytest.raises(RuntimeError, match="1 computations still have requests after 2 rounds"):
        run_collective([ask(2), ask(3)], Echo(), rounds=2)


def test_a_lockstep_run_raises_where_some_shards_have_ended():
    assert run_lockstep([ask(2), ask(2)]) == [2, 2]
    with pytest.raises(RuntimeError, match="1 of 2 shards have finished"):
        run_lockstep([ask(1), ask(2)])
