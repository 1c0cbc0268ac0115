"""What is stepped together is bounded in size."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from arg_dist.sharding.lanes import AT_ONCE
from arg_dist.sharding.plan import lanes_of


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_lanes_are_in_order_bounded_and_as_few_as_that_allows(sizes, bucket_size):
    lanes = lanes_of(sizes, bucket_size)
    assert [i for lane in lanes for i in lane] == list(range(len(sizes)))
    for lane in lanes:
        assert len(lane) <= 1 or AT_ONCE * sum(sizes[i] for i in lane) <= bucket_size
    for lane, after in pairwise(lanes):
        assert AT_ONCE * (sum(sizes[i] for i in lane) + sizes[after.start]) > bucket_size
