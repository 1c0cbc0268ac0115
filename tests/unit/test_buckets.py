"""What is stepped together is bounded in size."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from arg_dist.sharding.plan import buckets_of


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_buckets_are_in_order_bounded_and_as_few_as_that_allows(sizes, limit):
    buckets = buckets_of(sizes, limit)
    assert [i for bucket in buckets for i in bucket] == list(range(len(sizes)))
    for bucket in buckets:
        assert len(bucket) <= 1 or sum(sizes[i] for i in bucket) <= limit
    for bucket, after in pairwise(buckets):
        assert sum(sizes[i] for i in bucket) + sizes[after.start] > limit
