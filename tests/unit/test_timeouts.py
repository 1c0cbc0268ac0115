"""Waiting on devices: buffers are freed, limits are told, errors keep their causes."""

from __future__ import annotations

import logging
import time
import weakref
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from arg_dist.sharding import timeouts
from arg_dist.sharding.timeouts import UNKNOWN_SECONDS, NoAnswerError, Waiting, Watch

CPU = torch.device("cpu")


class Work:
    """A collective under way, with its buffers."""

    def __init__(self) -> None:
        self.buffer = torch.ones(3)
        self.is_done = False

    def is_completed(self) -> bool:
        return self.is_done

    def wait(self) -> None:
        """Returns at once, as where the device waits."""


class Roll:
    """Other processes, which all answer."""

    def __init__(self, group: object = None) -> None:
        self.this_process = "process 0 of 2"

    def say_here(self, count: int, words: str) -> None: ...

    def say_gone(self) -> None: ...

    def call(self, count: int, words: str) -> str:
        return "no response from process 1"


def waiting_of(monkeypatch: pytest.MonkeyPatch, own: float, seconds: float | None) -> Waiting:
    """Waiting on a backend that is not gloo, whose own timeout is `own`."""
    monkeypatch.setattr(timeouts, "RollCall", Roll)
    options = SimpleNamespace(_timeout=timedelta(seconds=own))
    backend = SimpleNamespace(options=options, name=lambda: "nccl")
    return Waiting(SimpleNamespace(_get_backend=lambda device: backend), CPU, seconds)


def is_gone(reference: weakref.ref) -> bool:
    deadline = time.monotonic() + 10
    while reference() is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    return reference() is None


def test_buffers_are_freed_when_their_collective_is_done_not_with_the_next_one():
    watch = Watch(Roll(), seconds=1000)
    for _ in range(2):  # at once, and after the thread has had nothing to do
        work = Work()
        buffer = weakref.ref(work)
        watch.look_at(work, 1, lambda: "a round")
        time.sleep(0.3)
        assert buffer() is not None
        work.is_done = True
        del work
        assert is_gone(buffer)


def test_a_watch_that_nobody_needs_ends():
    watch = Watch(Roll(), seconds=0.8)
    gone = weakref.ref(watch)
    del watch
    assert is_gone(gone)


@pytest.mark.parametrize(
    ("seconds", "level"),
    [(3600.0, logging.WARNING), (UNKNOWN_SECONDS, logging.INFO), (600.0, None)],
)
def test_a_limit_beyond_the_groups_own_timeout_is_told(monkeypatch, caplog, seconds, level):
    with caplog.at_level(logging.INFO, "arg_dist"):
        waiting_of(monkeypatch, own=600, seconds=seconds)
    assert [record.levelno for record in caplog.records] == ([] if level is None else [level])
    for record in caplog.records:
        assert f"collective_timeout: got {seconds:g} s" in record.getMessage()
        assert f"timeout=timedelta(seconds={seconds:g})" in record.getMessage()
        assert "has taken 600 s" in record.getMessage()


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        (
            "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4, OpType="
            "ALLTOALL_BASE) ran for 600012 milliseconds before timing out.",
            NoAnswerError,
            "Cause: Watchdog caught collective operation timeout",
        ),
        (
            "NCCL error in: ProcessGroupNCCL.cpp:1970, remote process exited or there was a "
            "network error, NCCL version 2.21.5\nncclRemoteError: A call failed",
            NoAnswerError,
            "no response from process 1",
        ),
        ("NCCL communicator was aborted on rank 0.", NoAnswerError, "in a round"),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", RuntimeError, "^CUDA out of memory"),
        ("Duplicate GPU detected : rank 0 and rank 1", RuntimeError, "^Duplicate GPU"),
    ],
)
def test_only_silence_of_others_is_called_so(monkeypatch, text, kind, told):
    def start(limit: timedelta) -> Work:
        raise RuntimeError(text)

    with pytest.raises(RuntimeError, match=told) as raised:
        waiting_of(monkeypatch, own=600, seconds=600).begin(start, lambda: "a round")
    assert type(raised.value) is kind


@pytest.mark.parametrize(
    ("own", "seconds", "told"),
    [
        (600, 1e-6, r"waited \S+ s \(collective_timeout=1e-06\) in a round"),
        (1e-6, None, r"waited \S+ s \(timeout of the process group: 1e-06\) in a round"),
        (600, 600, r"failed after \S+ s in a round"),
    ],
)
def test_the_limit_that_was_reached_is_named(monkeypatch, own, seconds, told):
    def start(limit: timedelta) -> Work:
        raise RuntimeError("NCCL communicator was aborted on rank 0.")

    with pytest.raises(NoAnswerError, match=told):
        waiting_of(monkeypatch, own, seconds).begin(start, lambda: "a round")
