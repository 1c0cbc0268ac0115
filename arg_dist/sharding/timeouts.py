"""Time limits of collectives, and the error reported when other processes do not join.

On gloo, a process that waits too long raises an error. Other backends return before the collective
completes, and an exception cannot interrupt a process blocked on its device; there, a thread logs
the same message, and the backend's own watchdog (NCCL's) terminates the process after the process
group's timeout. This applies to all collectives of the group, so a longer limit cannot be set here.
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

from arg_dist.library_internals import BACKEND_OF_GROUP, BACKEND_TIMEOUT
from arg_dist.sharding.stragglers import ROLL_CALL_SECONDS, RollCall, enumerated

NAMED = 3
"""Maximum number of matrices named in a message; the others are counted."""

UNKNOWN_SECONDS = 1800.0
"""Time limit of a backend that does not report its own."""

POLLING_SECONDS = 0.1
"""How often a thread looks whether a collective has completed, to free its buffers."""

SILENCE = re.compile(
    # gloo
    r"Timed out waiting \d+ms|Application timeout|Connection (?:closed|reset|refused)|Broken pipe|"
    # NCCL: a watchdog's timeout, a group that was aborted after another's error, a lost connection
    r"collective operation timeout|before timing out|communicator was aborted|ncclRemoteError|"
    r"remote process exited|network error|"
    # the store of the rendezvous
    r"Socket Timeout|wait timeout",
    re.IGNORECASE,
)
"""Words of backends for other processes that do not answer, or have exited."""

Words = Callable[[], str]
"""Returns the purpose of a collective for messages; called only if a process waits too long."""

log = logging.getLogger("arg_dist")


class NoAnswerError(RuntimeError):
    """Other processes did not join a collective in time, or have terminated.

    The message reports how long this process waited, in which collective, for which matrices and,
    if they can be determined, for which processes.
    """


def named(names: Sequence[str]) -> str:
    """The first few names, and the number of the remaining ones."""
    return enumerated(names, NAMED) if names else "matrices of other processes"


class Waiting:
    """Carries out one process group's collectives within a time limit.

    Args:
        group: the processes.
        device: device of their messages.
        seconds: time limit of one collective; None: the group's own timeout.
        watched: monitor collectives from a thread instead of waiting in this process; default: if
            the backend is not gloo.

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
        backend = BACKEND_OF_GROUP.of(group)(device)
        own = _own_seconds(backend)
        self.seconds = own if seconds is None else seconds
        self._is_own = seconds is None
        self._roll = RollCall(group)
        self._count = 0
        self._watch: Watch | None = None
        if backend.name() != "gloo" if watched is None else watched:
            self._compare(own)
            # log before the group's own timeout terminates the process
            self._watch = Watch(self._roll, min(self.seconds, 0.9 * own))

    def begin(self, start: Callable[[timedelta], dist.Work], words: Words) -> Callable[[], None]:
        """Start a collective of the group; several may be in flight.

        Args:
            start: starts the collective with the time limit it is passed.
            words: returns the purpose for messages.

        Returns:
            A function that waits for the collective; to be called once.

        Raises:
            NoAnswerError: here or while waiting: the others did not join in time, or a connection
                broke.
        """
        self._count += 1
        count, started = self._count, time.monotonic()

        def finish() -> None:
            with self._no_answer_error(count, started, words):
                self._wait(work, count, started, words)

        with self._no_answer_error(count, started, words):
            # the operation itself must time out: while it runs, it blocks the process from exiting
            work = start(timedelta(seconds=self.seconds))
        if self._watch is not None:
            self._watch.look_at(work, count, words)
        return finish

    def _compare(self, own: float) -> None:
        """Log if the group's timeout, which cannot be changed here, is shorter than the limit."""
        if self.seconds > own:
            level = logging.INFO if self.seconds == UNKNOWN_SECONDS else logging.WARNING
            log.log(
                level,
                f"collective_timeout: got {self.seconds:g} s, but torch terminates the process "
                f"when a collective of the process group has taken {own:g} s; pass "
                f"timeout=timedelta(seconds={self.seconds:g}) to init_process_group as well",
            )

    def _wait(self, work: dist.Work, count: int, started: float, words: Words) -> None:
        if self._watch is not None:
            work.wait()
        elif not self._completes_in_half_the_time(work, started):
            self._roll.say_here(count, words())
            work.wait(_until(started + self.seconds + ROLL_CALL_SECONDS))
            self._roll.say_gone()

    def _completes_in_half_the_time(self, work: dist.Work, started: float) -> bool:
        try:
            work.wait(_until(started + self.seconds / 2))
        except RuntimeError:
            if not work.is_completed():
                return False
            work.wait()  # raises the error, unless the work has just completed
        return True

    @contextmanager
    def _no_answer_error(self, count: int, started: float, words: Words) -> Iterator[None]:
        """Convert a RuntimeError of the backend to a NoAnswerError, unless it has another cause."""
        try:
            yield
        except RuntimeError as error:
            waited = time.monotonic() - started
            if self._watch is not None and not SILENCE.search(str(error)):
                raise  # of the device: out of memory, two processes on one device
            raise NoAnswerError(self._message(count, waited, words(), str(error))) from error

    def _message(self, count: int, waited: float, words: str, cause: str) -> str:
        found = self._roll.call(count, words)
        if waited < 0.9 * self.seconds:
            happened = f"failed after {waited:.1f} s"
        elif self._is_own:
            happened = f"waited {waited:.1f} s (timeout of the process group: {self.seconds:g})"
        else:
            happened = f"waited {waited:.1f} s (collective_timeout={self.seconds:g})"
        return (
            f"{self._roll.this_process} {happened} in {words}; {found}. Weights and state may be "
            "partially updated: terminate all processes and resume from the last checkpoint. A "
            "process that does not respond has terminated, is stuck (check its own output), has "
            "called step() less or more often than this one, or is slower than the limit allows. "
            f"Cause: {_shortened(cause)}"
        )


class Watch:
    """A thread that logs collectives that exceed the time limit, for asynchronous devices.

    Tested only with gloo, not with NCCL.

    Args:
        roll: the processes.
        seconds: the time limit.
    """

    def __init__(self, roll: RollCall, seconds: float) -> None:
        self._roll = roll
        self._seconds = seconds
        self._begun: deque[tuple[float, dist.Work, int, Words]] = deque()
        self._lock = threading.Lock()
        self._waking = threading.Event()
        self._logged = self._noted = 0
        arguments = (weakref.ref(self), self._waking)
        threading.Thread(target=_keep_watch, args=arguments, daemon=True).start()

    def look_at(self, work: dist.Work, count: int, words: Words) -> None:
        """Watch collective number `count`; collectives complete in the order they start."""
        with self._lock:
            self._begun.append((time.monotonic(), work, count, words))
        self._oldest()
        self._waking.set()

    def check(self) -> float:
        """Log the oldest collective, once, if it is late; return seconds until the next check."""
        oldest = self._oldest()
        if self._noted and (oldest is None or oldest[2] != self._noted):
            self._noted = 0
            self._roll.say_gone()
        if oldest is not None:
            started, _, count, words = oldest
            waited = time.monotonic() - started
            if waited >= self._seconds / 2 and self._noted != count:
                self._noted = count
                self._roll.say_here(count, words())
            if waited >= self._seconds and count != self._logged:
                self._logged = count
                log.error(
                    f"{self._roll.this_process} has waited {waited:.1f} s in {words()}; "
                    f"{self._roll.call(count, words())}"
                )
        if oldest is None:
            return self._seconds / 8
        return min(self._seconds / 8, POLLING_SECONDS)

    def _oldest(self) -> tuple[float, dist.Work, int, Words] | None:
        with self._lock:
            while self._begun and self._begun[0][1].is_completed():
                self._begun.popleft()
            return self._begun[0] if self._begun else None


def _keep_watch(watch: weakref.ref[Watch], waking: threading.Event) -> None:
    pause = 0.0
    while True:
        # while nothing is under way, until something begins; else until it may have completed
        if waking.wait(pause):
            waking.clear()
            time.sleep(POLLING_SECONDS)
        alive = watch()
        if alive is None:
            return
        pause = alive.check()
        del alive


def _until(moment: float) -> timedelta:
    """Time from now to `moment`; always positive, as zero means no timeout."""
    return timedelta(seconds=max(0.001, moment - time.monotonic()))


def _shortened(cause: str) -> str:
    """The first sentence of a backend's error, without its source location."""
    line = re.sub(r"^\[[^]]+\] *", "", cause.partition("\n")[0])
    return line.partition(". This is typically")[0][:200]


def _own_seconds(backend: Any) -> float:
    """The backend's own timeout in seconds."""
    options = getattr(backend, "options", None)
    if options is None:
        return UNKNOWN_SECONDS
    return float(BACKEND_TIMEOUT.of(options).total_seconds())
