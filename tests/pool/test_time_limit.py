"""Processes that do not come to a collective: the others do not wait for ever, and say for whom."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from matrices import gaussian
from one_process import feed
from processes import ProcessPool

from arg_dist import AdaRankGrad
from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.stragglers import ROLL_CALL_SECONDS, RollCall, note_key
from arg_dist.sharding.timeouts import NoAnswerError, Waiting
from tests.launch.forking import context

PROCESSES = 3
CULPRIT = 1
LIMIT = 1.0
A_LANE_EACH = {"bucket_size": 2 * 24 * 16 * 4}
"""Messages for two matrices are under way at a time."""
NAMES = [f"layer{i}.weight" for i in range(5)]
AWAY = LIMIT + ROLL_CALL_SECONDS + 2
"""Seconds for which a process stays away: until the others have given up, on a busy machine too."""
PATIENCE = 40
"""Seconds that a test may take, the start of new processes included."""


@pytest.fixture(scope="module")
def own_pool() -> Iterator[ProcessPool]:
    """Processes whose connections these tests may break, and which then start anew."""
    processes = ProcessPool(PROCESSES, context)
    yield processes
    processes.close()


def fresh_group() -> dist.ProcessGroup:
    """A group that no test before has broken."""
    return dist.new_group(range(PROCESSES))


def build(group, limit: float, **settings) -> AdaRankGrad:
    named = [(name, torch.nn.Parameter(gaussian(24, 16, seed=i))) for i, name in enumerate(NAMES)]
    return AdaRankGrad(named, process_group=group, max_rank=4, collective_timeout=limit, **settings)


def step(optimizer: AdaRankGrad) -> None:
    feed(optimizer, *(gaussian(24, 16, seed=10 + i) for i in range(len(NAMES))))


def step_and_consolidate(group, limit: float = LIMIT, **settings) -> None:
    optimizer = build(group, limit, **settings)
    dist.barrier(group)  # the first one that is built takes its time
    step(optimizer)
    optimizer.consolidate_state_dict()


def before_call(number: int, act: Callable[[], None]) -> None:
    """Does something before this process takes part in a collective of the optimizer."""
    begin, calls = Waiting.begin, iter(range(1, number + 1))

    def patched(self, start, words):
        if next(calls, None) == number:
            act()
        return begin(self, start, words)

    Waiting.begin = patched


def stay_away(group, number: int, settings) -> str:
    """One process comes too late to a collective; what the others say."""
    group, begin = fresh_group(), Waiting.begin
    if dist.get_rank() == CULPRIT:
        before_call(number, lambda: time.sleep(AWAY))
    try:
        step_and_consolidate(group, **settings)
    except NoAnswerError as error:
        return str(error)
    finally:
        Waiting.begin = begin
    return ""


@pytest.mark.parametrize(
    ("number", "settings", "where"),
    [
        (1, {}, r"in comparing layouts at the first step \(an all-to-all\)"),
        (
            6,
            {},
            rf"in round 3 of \d+ of the step for {', '.join(NAMES[:3])} and 2 more \(an all-to",
        ),
        (7, A_LANE_EACH, rf"in round 2 of \d+ of the step for {NAMES[1]} \(an all-to-all\)"),
        (23, {}, rf"in consolidate_state_dict for {NAMES[0]} \(an all-to-all\)"),
    ],
)
def test_who_waits_too_long_says_where_for_which_matrices_and_for_whom(
    own_pool, number, settings, where
):
    results = own_pool.run(stay_away, PROCESSES, number, settings, seconds=PATIENCE)
    for process in (0, 2):
        message = results[process]
        assert re.search(where, message), message
        told = re.match(
            rf"process {process} of 3 waited (.*) s \(collective_timeout=1\) in ", message
        )
        assert told and LIMIT - 0.1 <= float(told[1]) < AWAY, message
        assert f"; no response from process {CULPRIT}. " in message
        assert "resume from the last checkpoint" in message
    # it comes to connections that the others have closed
    assert f"process {CULPRIT} of 3 failed after" in results[CULPRIT]


def come_late(group) -> tuple[list[int], str | None]:
    """A process is slow, but in time; what was gathered, and the note that was left."""
    group = fresh_group()
    communicator = Communicator(group, time_limit=4)
    if dist.get_rank() == CULPRIT:
        time.sleep(2.5)
    gathered = communicator.gather_objects(dist.get_rank())
    key, store = note_key(dist.get_rank()), group.get_group_store()
    return gathered, store.get(key).decode() if store.check([key]) else None


def test_who_waits_long_but_not_too_long_gets_his_answer(own_pool):
    results = own_pool.run(come_late, PROCESSES, seconds=PATIENCE)
    assert [gathered for gathered, _ in results] == [[0, 1, 2]] * 3
    # at half time the others left notes, and took them back
    assert [note for _, note in results] == ["null", None, "null"]


def wait_elsewhere(group) -> str:
    group = fresh_group()
    if dist.get_rank() == CULPRIT:
        RollCall(group).say_here(7, "round 2 of 3 of something else")
        time.sleep(AWAY)
        return ""
    with pytest.raises(NoAnswerError) as raised:
        Communicator(group, LIMIT).gather_objects_on_first(1, "a gathering of ones")
    return str(raised.value)


def test_a_process_that_waits_elsewhere_is_told(own_pool):
    for process, message in enumerate(own_pool.run(wait_elsewhere, PROCESSES, seconds=PATIENCE)):
        if process != CULPRIT:
            assert "in a gathering of ones (an all-to-all)" in message
            assert f"; process {CULPRIT} waits in round 2 of 3 of something else. " in message


def be_watched(group) -> tuple[list[str], list[int]]:
    """What a thread logs that looks on, where the process itself would not wait."""
    group = fresh_group()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("arg_dist").addHandler(handler)
    communicator = Communicator(group)
    communicator._waiting = Waiting(group, torch.device("cpu"), LIMIT, watched=True)
    communicator._waiting.seconds = 60  # of gloo, which would end what only the watch may see
    if dist.get_rank() == CULPRIT:
        time.sleep(AWAY)
    gathered = communicator.gather_objects(dist.get_rank(), "a test")
    logging.getLogger("arg_dist").removeHandler(handler)
    return lines, gathered


def test_a_thread_tells_where_an_exception_could_not(own_pool):
    results = own_pool.run(be_watched, PROCESSES, seconds=PATIENCE)
    assert [gathered for _, gathered in results] == [[0, 1, 2]] * 3
    for process in (0, 2):
        (line,) = results[process][0]
        assert re.fullmatch(
            rf"process {process} of 3 has waited \d\.\d s in a test \(an all-to-all\); "
            rf"no response from process {CULPRIT}",
            line,
        )
    assert results[CULPRIT][0] == []


def be_struck(group, number: int, with_signal: int, limit: float) -> None:
    if dist.get_rank() == CULPRIT:
        before_call(number, lambda: os.kill(os.getpid(), with_signal))
    step_and_consolidate(group, limit)


@pytest.mark.parametrize(
    ("with_signal", "limit", "number", "how", "where"),
    [
        (
            signal.SIGSTOP,
            LIMIT,
            6,
            r"waited \S+ s \(collective_timeout=1\)",
            r"round 3 of \d+ of the step",
        ),
        (signal.SIGKILL, PATIENCE, 3, r"failed after \S+ s", "the sum of norms"),
    ],
)
def test_a_process_that_is_stopped_or_killed_is_told_by_the_others(
    own_pool, with_signal, limit, number, how, where
):
    with pytest.raises(RuntimeError) as raised:
        own_pool.run(be_struck, PROCESSES, number, with_signal, limit, seconds=PATIENCE)
    for process in (0, 2):
        assert re.search(
            rf"NoAnswerError: process {process} of 3 {how} in {where} for "
            rf"{NAMES[0]}.*; no response from process {CULPRIT}\. ",
            str(raised.value),
        ), raised.value
