"""Lanes: what is under way is bounded, and while messages travel, something computes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arg_dist.config import parse_config
from arg_dist.recording import requests_of_a_step
from arg_dist.sharding.layout import shard_matrix
from arg_dist.sharding.overlap import (
    AT_ONCE,
    WORTH_IT,
    Lane,
    Load,
    lanes_of,
    load_of,
    run_lanes,
    turns,
)
from arg_dist.subspace.distributed import Exchange

loads = st.builds(
    Load, st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(0, 3)
)


def most(items: list[Load]) -> int:
    """Bytes of the process with most, in its fullest round."""
    homes = {item.home for item in items}
    there = [sum(item.at_home for item in items if item.home == home) for home in homes]
    return max(sum(item.everywhere for item in items), *there)


@given(st.lists(loads, max_size=30), st.integers(1, 60))
def test_lanes_are_in_order_bounded_and_as_few_as_that_allows(items, bucket_size):
    lanes = lanes_of(items, bucket_size)
    limit = max([bucket_size // AT_ONCE, *(most([item]) for item in items)])
    assert [i for lane in lanes for i in lane] == list(range(len(items)))
    for lane in lanes:
        assert not lane or most(items[lane.start : lane.stop]) <= limit
    for lane, after in pairwise(lanes):
        assert most(items[lane.start : after.start + 1]) > limit


@given(st.lists(st.integers(1, WORTH_IT // 4), min_size=2, max_size=20))
def test_a_large_model_takes_turns_even_where_one_bucket_holds_it(sizes):
    lanes = lanes_of([Load(size) for size in sizes], bucket_size=100 * WORTH_IT)
    assert [i for lane in lanes for i in lane] == list(range(len(sizes)))
    assert len(lanes) == (AT_ONCE if sum(sizes) >= WORTH_IT else 1)
    if len(lanes) > 1:
        assert sum(sizes[i] for i in lanes[0]) <= sum(sizes) / AT_ONCE or len(lanes[0]) == 1


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.booleans(), st.booleans())
def test_a_load_is_most_of_what_a_steady_step_sends_or_receives(
    rows, columns, processes, spans_columns, replicated
):
    bounds = [rows * columns * i // processes for i in range(processes + 1)]
    ranges = tuple(pairwise(bounds))
    if replicated:
        ranges = ((0, rows * columns),) * processes
    settings = parse_config({"max_rank": 4, "min_rank": 4})
    rank = settings.rank_bounds(min(rows, columns))[1]
    for me in range(processes):
        sharding = shard_matrix(
            rows, columns, ranges, me=me, spans_columns=spans_columns, home=1, shard_basis=True,
            replicated=replicated,
        )  # fmt: skip
        load, state = load_of(sharding, rank, goes_home=True), {}
        if me not in sharding.owners:
            continue
        for _ in range(2):
            requests = requests_of_a_step(state, sharding, settings, rank)
        received = [sum(each.answer_bytes(me) for each in request) for request in requests]
        limit = max(load.everywhere, (me == sharding.home) * (load.at_home + load.everywhere))
        assert max(received, default=0) <= limit
        assert (load == Load(load.weights)) == (len(sharding.owners) == 1)


@given(st.lists(st.integers(0, 6), max_size=7))
def test_lanes_go_on_in_turns(rounds):
    order, lanes = list(turns(rounds)), len(rounds)
    for lane in range(lanes):
        assert [turn for number, turn in order if number == lane] == list(range(rounds[lane] + 1))
    assert [number for number, turn in order if turn == 0] == list(range(lanes))
    under_way: set[int] = set()
    for lane, turn in order:
        if turn < rounds[lane]:
            under_way.add(lane)
        else:
            under_way.discard(lane)
        assert len(under_way) <= AT_ONCE
    for lane in range(lanes):
        mine = [i for i, (number, _) in enumerate(order) if number == lane]
        for sent, answered in pairwise(mine):
            if any(number != lane for number, _ in order[answered:]):
                assert answered > sent + 1, "nothing computes while it waits"


class Recorder:
    """A communicator that answers with what was sent, and notes what happens when."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def begin(self, exchanges, words):
        name = words().rpartition(" ")[2]
        self.events.append(f"send {name}")

        def answers():
            self.events.append(f"answer {name}")
            return [exchange.part for exchange in exchanges]

        return answers


def lane_of(recorder: Recorder, name: str, asks: list[int]) -> Lane[int]:
    """Computations that ask so many times each; they and what they lead to are noted."""

    def asking(number: int, times: int):
        for _ in range(times):
            recorder.events.append(f"compute {name}{number}")
            yield Exchange(torch.ones(1), ((0, 1),) * 2, ((0, 1),) * 2)
        return number

    return Lane(
        [asking(number, times) for number, times in enumerate(asks)],
        lambda results: recorder.events.extend(f"finish {name}{each}" for each in results.values()),
        name,
        meanwhile=lambda: recorder.events.append(f"meanwhile {name}"),
    )


def recorded(lanes: dict[str, list[int]], rounds: int) -> list[str]:
    """What happens, in order, where every lane has so many rounds."""
    recorder = Recorder()
    made = [
        lambda name=name, asks=asks: lane_of(recorder, name, asks) for name, asks in lanes.items()
    ]
    run_lanes(made, recorder, [rounds] * len(lanes))
    return recorder.events


def test_while_messages_of_one_lane_are_under_way_the_other_computes():
    events = recorded({"a": [2], "b": [2], "c": [2]}, rounds=2)
    for name in "abc":
        sent = [i for i, event in enumerate(events) if event == f"send {name}"]
        answered = [i for i, event in enumerate(events) if event == f"answer {name}"]
        assert len(sent) == len(answered) == 2
        for start, stop in zip(sent, answered, strict=True):
            others = [event for event in events[start:stop] if event[-1] != name]
            assert any(
                event.split()[0] in ("compute", "finish", "meanwhile") for event in others
            ) or (name == "c" and start == sent[-1])


def test_one_lane_alone_finishes_and_does_the_rest_while_its_messages_travel():
    assert recorded({"a": [2, 1, 0]}, rounds=2) == [
        *("compute a0", "compute a1", "send a", "meanwhile a", "finish a2", "answer a"),
        *("compute a0", "send a", "finish a1", "answer a", "finish a0"),
    ]


def test_without_rounds_nothing_is_sent():
    assert recorded({"a": [0], "b": [0]}, rounds=0) == [
        *("meanwhile a", "finish a0", "meanwhile b", "finish b0"),
    ]


def test_a_round_more_than_agreed_is_an_error():
    with pytest.raises(RuntimeError, match="1 computations still have requests after 2 rounds"):
        recorded({"a": [2, 3]}, rounds=2)
