"""Requests over many shards: sums of whole numbers, equal to the bit to those of the whole."""

from __future__ import annotations

from functools import partial

import torch
from cuts import WORLD_SIZES, cut_matrix, element_ranges, part_of
from hypothesis import given
from hypothesis import strategies as st
from matrices import whole_numbers

from arg_dist.sharding.drivers import run_local, run_lockstep
from arg_dist.subspace.distributed import (
    even_rows,
    gather,
    relayed_gather,
    relayed_sum,
    single_process,
    sum_scatter,
)
from arg_dist.subspace.range_finder import leading_directions, range_finder

SIZE = 9
interval = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted).map(tuple)


@st.composite
def having_and_wanting(draw):
    """For each of N processes, the rows it contributes to and the rows it wants; any overlap."""
    processes = draw(st.sampled_from(WORLD_SIZES))
    rows = st.lists(interval, min_size=processes, max_size=processes).map(tuple)
    return draw(rows), draw(rows)


@given(having_and_wanting())
def test_everyone_gets_the_sums_of_the_rows_he_wants(rows):
    have, want = rows
    whole, steps = torch.zeros(SIZE, 2), []
    for me, (low, high) in enumerate(have):
        part = whole_numbers(high - low, 2, seed=me)
        whole[low:high] += part
        steps.append(sum_scatter(part, have, want, me))
    for (low, high), answer in zip(want, run_lockstep(steps), strict=True):
        assert torch.equal(answer, whole[low:high])


@given(element_ranges(SIZE), st.data())
def test_everyone_gets_the_rows_he_wants_of_what_is_held_in_parts(have, data):
    want = tuple(data.draw(interval) for _ in have)
    whole = whole_numbers(SIZE, 2)
    steps = [gather(whole[slice(*held)], have, want, me) for me, held in enumerate(have)]
    for (low, high), answer in zip(want, run_lockstep(steps), strict=True):
        assert torch.equal(answer, whole[low:high])


@given(st.sampled_from(WORLD_SIZES), st.integers(1, SIZE))
def test_everyone_gets_the_whole_total(processes, size):
    parts = [whole_numbers(size, 2, seed=me) for me in range(processes)]
    whole, shares = ((0, size),) * processes, even_rows(size, processes)
    steps = [relayed_sum(part, whole, shares, whole, me) for me, part in enumerate(parts)]
    assert all(torch.equal(each, sum(parts)) for each in run_lockstep(steps))


@given(st.sampled_from(WORLD_SIZES), st.integers(1, SIZE), st.data())
def test_what_goes_by_way_of_everyone_is_what_goes_straight(processes, size, data):
    home = data.draw(st.integers(0, processes - 1))
    want = tuple(data.draw(interval) for _ in range(processes))
    want = tuple((min(low, size), min(high, size)) for low, high in want)
    at_home = tuple((0, size if me == home else 0) for me in range(processes))
    shares, whole = even_rows(size, processes), whole_numbers(size, 2)
    held = [whole[: high - low] for low, high in at_home]
    steps = [relayed_gather(p, at_home, shares, want, me) for me, p in enumerate(held)]
    for (low, high), answer in zip(want, run_lockstep(steps), strict=True):
        assert torch.equal(answer, whole[low:high])
    have = ((0, size),) * processes
    parts = [whole_numbers(size, 2, seed=me) for me in range(processes)]
    steps = [relayed_sum(p, have, shares, at_home, me) for me, p in enumerate(parts)]
    for me, answer in enumerate(run_lockstep(steps)):
        assert torch.equal(answer, sum(parts)) if me == home else len(answer) == 0


def oriented(matrix: torch.Tensor, spans_columns: bool) -> torch.Tensor:
    return matrix if spans_columns else matrix.T


@given(element_ranges(7 * 6), st.booleans(), st.integers(0, 9))
def test_the_range_of_an_integer_gradient_is_that_of_the_whole(ranges, spans_columns, home):
    gradient = whole_numbers(7, 6)
    whole = oriented(gradient, spans_columns)
    omega = whole_numbers(whole.shape[0], 4, seed=1)
    expected = run_local(
        range_finder(lambda: whole, omega, single_process(*whole.shape), power_passes=0)
    )
    shards = cut_matrix(gradient, ranges, spans_columns=spans_columns, home=home)
    found = run_lockstep(
        [
            range_finder(
                partial(block, shard, gradient),
                omega[slice(*shard.sharding.moment.touch[me])],
                shard.sharding,
                power_passes=0,
            )
            for me, shard in enumerate(shards)
        ]
    )
    for me, vectors in enumerate(found):
        is_home = me == shards[me].sharding.home
        assert torch.equal(vectors, expected if is_home else expected[:0])


@given(element_ranges(7 * 6), st.booleans(), st.integers(0, 2))
def test_energies_have_the_same_bits_on_every_owner(ranges, spans_columns, power_passes):
    gradient = whole_numbers(7, 6)
    shards = cut_matrix(gradient, ranges, spans_columns=spans_columns)
    omega = whole_numbers(shards[0].sharding.moment.size, 4, seed=1)
    found = run_lockstep(
        [
            leading_directions(
                partial(block, shard, gradient),
                omega[slice(*shard.sharding.moment.touch[me])],
                shard.sharding,
                power_passes=power_passes,
            )
            for me, shard in enumerate(shards)
        ]
    )
    owners = shards[0].sharding.owners
    assert all(torch.equal(found[i].energies, found[owners[0]].energies) for i in owners)
    assert [me for me, each in enumerate(found) if len(each.vectors)] == [shards[0].sharding.home]


def block(shard, gradient: torch.Tensor) -> torch.Tensor:
    """A shard's part of the gradient; no rows and no columns where it holds nothing."""
    part = part_of(gradient, shard)
    return shard.oriented_gradient(part) if len(part) else torch.zeros(0, 0)
