"""How long a process waits for the others in a collective, and what it says when they do not come.

On gloo the process that has waited too long gets an error. Other backends return before the others
have come, and a process whose device waits cannot be reached by an exception; there a thread looks
on and logs the same words, and the backend's own watchdog (NCCL's) ends the process.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from arg_dist.sharding.roll_call import ROLL_CALL_SECONDS, RollCall, enumerated

NAMED = 3
"""So many matrices are named, the others are counted."""

UNKNOWN_SECONDS = 1800.0
"""Time limit of a backend that does not tell its own."""

Words = Callable[[], str]
"""What a collective is for, in words; asked for only where somebody waits too long."""

log = logging.getLogger("arg_dist")


class NoAnswerError(RuntimeError):
    """Other processes did not come to a collective in time, or are gone.

    The message tells how long this one waited, where, for which matrices and, where they can be
    found out, for which processes.
    """


def named(names: Sequence[str]) -> str:
    """The first few names, and how many there are besides."""
    return enumerated(names, NAMED) if names else "matrices of other processes"


class Waiting:
    """Carries out one process group's collectives within a time limit.

    Args:
        group: the processes.
        device: where their messages lie.
        seconds: how long to wait in one collective; None: as long as the group does itself.
        watched: whether a thread looks on, rather than this process wait; by default, wherever the
            backend is not gloo.

    Attributes:
        seconds: the time limit.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        seconds: float | None = None,
        *,
        watched: bool | None = None,
    ) -> None:
        backend = group._get_backend(device)
        own = _own_seconds(backend)
        self.seconds = own if seconds is None else seconds
        self._roll = RollCall(group)
        self._count = 0
        self._watch: Watch | None = None
        if backend.name() != "gloo" if watched is None else watched:
            # where the group's own limit ends the process, no words can follow
            self._watch = Watch(self._roll, min(self.seconds, 0.9 * own))

    def begin(self, start: Callable[[timedelta], dist.Work], words: Words) -> Callable[[], None]:
        """Starts a collective of the group; several may be under way.

        Args:
            start: starts it, with a time limit of its own.
            words: what it is for.

        Returns:
            What, where a process waits by itself, waits for its end; called once.

        Raises:
            NoAnswerError: here or while waiting: the others did not come in time, or a connection
                broke.
        """
        self._count += 1
        count, started = self._count, time.monotonic()

        def finish() -> None:
            with self._told_in_time(count, started, words):
                self._wait(work, count, started, words)

        with self._told_in_time(count, started, words):
            # the operation itself has to end: one that goes on holds the process up when it exits
            work = start(timedelta(seconds=self.seconds))
        if self._watch is not None:
            self._watch.look_at(work, count, words)
        return finish

    def _wait(self, work: dist.Work, count: int, started: float, words: Words) -> None:
        if self._watch is not None:
            work.wait()
        elif not self._is_done_by_half_time(work, started):
            self._roll.say_here(count, words())
            work.wait(_until(started + self.seconds + ROLL_CALL_SECONDS))
            self._roll.say_gone()

    def _is_done_by_half_time(self, work: dist.Work, started: float) -> bool:
        try:
            work.wait(_until(started + self.seconds / 2))
        except RuntimeError:
            if not work.is_completed():
                return False
            work.wait()  # raises what went wrong, unless it has ended just now
        return True

    @contextmanager
    def _told_in_time(self, count: int, started: float, words: Words) -> Iterator[None]:
        """Says in a NoAnswerError what went wrong."""
        try:
            yield
        except RuntimeError as error:
            waited = time.monotonic() - started
            raise NoAnswerError(self._told(count, waited, words(), str(error))) from error

    def _told(self, count: int, waited: float, words: str, cause: str) -> str:
        found = self._roll.call(count, words)
        if waited >= 0.9 * self.seconds:
            happened = f"waited {waited:.1f} s (time_limit={self.seconds:g})"
        else:
            happened = f"failed after {waited:.1f} s"
        return (
            f"{self._roll.this_process} {happened} in {words}; {found}. Weights and state may be "
            "in mid-step: end all processes and resume from the last checkpoint. A process that "
            "gives no word has ended, is stuck (its own output tells), or is slower than "
            f"time_limit allows. Cause: {_shortened(cause)}"
        )


class Watch:
    """A thread that logs which collective has not ended in time, for devices that work alone.

    Tested with gloo alone; with NCCL it is untried.

    Args:
        roll: the processes.
        seconds: the time limit.
    """

    def __init__(self, roll: RollCall, seconds: float) -> None:
        self._roll = roll
        self._seconds = seconds
        self._begun: deque[tuple[float, dist.Work, int, Words]] = deque()
        self._lock = threading.Lock()
        self._told = self._noted = 0
        threading.Thread(target=_keep_watch, args=(weakref.ref(self),), daemon=True).start()

    def look_at(self, work: dist.Work, count: int, words: Words) -> None:
        """Watches the collective number `count`; they end in the order in which they begin."""
        with self._lock:
            self._begun.append((time.monotonic(), work, count, words))
        self._oldest()

    def check(self) -> float:
        """Logs the oldest collective, once, if it is too late; returns seconds to the next look."""
        oldest = self._oldest()
        if self._noted and (oldest is None or oldest[2] != self._noted):
            self._noted = 0
            self._roll.say_gone()
        if oldest is not None:
            started, _, count, words = oldest
            waited = time.monotonic() - started
            if waited >= self._seconds / 2:
                self._noted = count
                self._roll.say_here(count, words())
            if waited >= self._seconds and count != self._told:
                self._told = count
                log.error(
                    f"{self._roll.this_process} has waited {waited:.1f} s in {words()}; "
                    f"{self._roll.call(count, words())}"
                )
        return self._seconds / 8

    def _oldest(self) -> tuple[float, dist.Work, int, Words] | None:
        with self._lock:
            while self._begun and self._begun[0][1].is_completed():
                self._begun.popleft()
            return self._begun[0] if self._begun else None


def _keep_watch(watch: weakref.ref[Watch]) -> None:
    pause = 0.0
    while True:
        time.sleep(pause)
        alive = watch()
        if alive is None:
            return
        pause = alive.check()
        del alive


def _until(moment: float) -> timedelta:
    """From now on; some time at least, as none would mean for ever."""
    return timedelta(seconds=max(0.001, moment - time.monotonic()))


def _shortened(cause: str) -> str:
    """The first sentence of a backend's error, without the place in its source."""
    line = re.sub(r"^\[\S+\] ", "", cause.partition("\n")[0])
    return line.partition(". This is typically")[0][:200]


def _own_seconds(backend: Any) -> float:
    """Seconds after which a backend's collectives fail by themselves."""
    options = getattr(backend, "options", None)
    return UNKNOWN_SECONDS if options is None else float(options._timeout.total_seconds())
