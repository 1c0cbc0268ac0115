"""Messages: what is packed on one process is what another one unpacks, to the bit."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arg_dist.sharding.drivers import run_lockstep
from arg_dist.sharding.message_packing import Messages
from arg_dist.sharding.transfers import ALIGNMENT
from arg_dist.subspace.distributed import Exchange, Rows, even_rows

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float64, torch.int64, torch.bfloat16)


def swap(requests: list[list[Exchange]]) -> list[list[Tensor]]:
    """The answers of every process, by messages that go from one to another in memory."""
    size = len(requests)
    everyone = [Messages(mine, me, size, CPU) for me, mine in enumerate(requests)]
    sent = [messages.packed() for messages in everyone]
    answers = []
    for messages, packed in zip(everyone, sent, strict=True):
        assert packed.numel() == sum(messages.send_sizes)
    for me, messages in enumerate(everyone):
        parts = []
        for other, theirs in enumerate(everyone):
            assert theirs.dtype == messages.dtype
            ends = list(accumulate(theirs.send_sizes, initial=0))
            part = sent[other][ends[me] : ends[me + 1]]
            assert part.numel() == messages.receive_sizes[other]
            assert part.nbytes % ALIGNMENT == 0
            parts.append(part)
        answers.append(messages.answers(torch.cat(parts)))
    return answers


def in_lockstep(requests: list[list[Exchange]]) -> list[list[Tensor]]:
    def ask(mine: list[Exchange]):
        return (yield tuple(mine))

    return [list(answers) for answers in run_lockstep([ask(mine) for mine in requests])]


@st.composite
def intervals(draw, processes: int, size: int) -> Rows:
    """Any rows for each process; or even parts, or all of them, there or on one, as is common."""
    kind = draw(st.sampled_from(["any", "even", "all", "home"]))
    if kind == "home":
        home = draw(st.integers(0, processes - 1))
        return tuple((0, size if i == home else 0) for i in range(processes))
    if kind == "even":
        return even_rows(size, processes)
    if kind == "all":
        return ((0, size),) * processes
    ends = st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted).map(tuple)
    return tuple(draw(st.lists(ends, min_size=processes, max_size=processes)))


@st.composite
def rounds(draw) -> list[list[Exchange]]:
    """What each of some processes asks for in a round."""
    processes = draw(st.integers(2, 5))
    asked = []
    for seed in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 40) | st.integers(1, 3).map(lambda each: each * processes))
        have, want = draw(intervals(processes, size)), draw(intervals(processes, size))
        shape = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
        dtype = draw(st.sampled_from(DTYPES))
        generator = torch.Generator().manual_seed(seed)
        parts = [
            torch.randint(-9, 9, (high - low, *shape), generator=generator).to(dtype)
            for low, high in have
        ]
        stacked = have == ((0, size),) * processes and draw(st.booleans())
        asked.append([Exchange(part, have, want, stacked) for part in parts])
    return [list(mine) for mine in zip(*asked, strict=True)]


@given(rounds())
def test_messages_bring_what_shards_in_lockstep_are_handed(requests):
    for actual, expected in zip(swap(requests), in_lockstep(requests), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_parts_that_are_not_contiguous_are_packed_by_rows():
    parts = [torch.arange(12.0).view(3, 4).T[:, :2], torch.arange(12.0, 24.0).view(3, 4).T[:, :2]]
    have, want = ((0, 4), (4, 8)), ((0, 8),) * 2
    for (answer,) in swap([[Exchange(part, have, want)] for part in parts]):
        assert torch.equal(answer, torch.cat(parts)) and answer.is_contiguous()


@pytest.mark.parametrize("processes", [2, 3])
def test_nothing_asked_is_nothing_sent(processes):
    messages = Messages([], 0, processes, CPU)
    assert messages.packed().numel() == 0
    assert messages.answers(torch.empty(0, dtype=messages.dtype)) == []
    assert messages.send_sizes == messages.receive_sizes == [0] * processes


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("size", [21, 32, 40])
def test_parts_that_differ_a_little_are_padded(size, processes):
    parts, everyone = even_rows(size, processes), ((0, size),) * processes
    home = tuple((0, size if i == 1 else 0) for i in range(processes))
    for have, want in ((everyone, parts), (parts, everyone), (parts, home), (home, parts)):
        held = [torch.randn(high - low, 7) for low, high in have]
        requests = [[Exchange(part, have, want)] * 2 for part in held]
        for actual, expected in zip(swap(requests), in_lockstep(requests), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
