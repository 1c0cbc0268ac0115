"""Who is said to be missing, whatever the store in which processes leave notes does."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from arg_dist.sharding import stragglers
from arg_dist.sharding.stragglers import RollCall, note_key

pytestmark = pytest.mark.unit

WORLD_SIZE = 16


class Group:
    """A group of all processes, of which this one is process 0."""

    def __init__(self, store) -> None:
        self.get_group_store = lambda: store


@pytest.fixture
def call_with(monkeypatch):
    """The roll call in collective 5 of a process that met the others by this store."""
    monkeypatch.setattr(stragglers, "ROLL_CALL_SECONDS", 0.3)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: WORLD_SIZE)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: list(range(WORLD_SIZE)))
    return lambda store: RollCall(Group(store)).call(5, "here")


def store_with(notes: dict[int, str]) -> dist.HashStore:
    store = dist.HashStore()
    for process, note in notes.items():
        store.set(note_key(process), note)
    return store


@pytest.mark.parametrize(
    ("notes", "told"),
    [
        (dict.fromkeys(range(1, WORLD_SIZE), '[5, "here"]'), "all other processes wait there, too"),
        (dict.fromkeys(range(2, WORLD_SIZE), '[5, "here"]'), "no response from process 1"),
        ({3: '[5, "here"]'}, "no response from process 1, 2, 4, 5, 6, 7, 8, 9 and 6 more"),
        (
            {**dict.fromkeys(range(1, WORLD_SIZE), '[5, "here"]'), 7: "null"},
            "no response from process 7",
        ),
        (
            {
                **dict.fromkeys(range(1, WORLD_SIZE), '[5, "here"]'),
                7: '[4, "there"]',
                9: '[4, "there"]',
            },
            "process 7, 9 waits in there",
        ),
    ],
)
def test_who_left_no_note_and_who_waits_elsewhere_is_told(call_with, notes, told):
    assert call_with(store_with(notes)) == told


class Broken:
    """A store that has gone with its process."""

    def set(self, key, value):
        raise dist.DistNetworkError("connection reset")


class Stuck:
    """A store whose process was stopped."""

    def set(self, key, value):
        time.sleep(20)


@pytest.mark.parametrize("store", [Broken(), Stuck()])
def test_a_store_that_does_not_answer_holds_nobody_up(call_with, store):
    started = time.monotonic()
    expected = "is unknown, as the rendezvous store (usually on process 0) did not respond"
    assert expected in call_with(store)
    assert time.monotonic() - started < 5
