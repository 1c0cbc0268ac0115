"""Which of the other processes wait as well: those that wait for long leave a note for each other.

The notes lie in the store by which the processes of a group met, which needs none of them to be in
a collective.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

ROLL_CALL_SECONDS = 2.0
"""How long a process that gives up looks for signs of the others."""

log = logging.getLogger("arg_dist")


class RollCall:
    """What processes that wait for long write for each other, in the store that they met by.

    Attributes:
        this_process: in words.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._me = dist.get_rank()
        self.this_process = f"process {self._me} of {dist.get_world_size()}"
        self._others = [i for i in dist.get_process_group_ranks(group) if i != self._me]
        self._store = group.get_group_store()

    def say_here(self, count: int, words: str) -> None:
        """Writes that this process waits in its collective number `count`."""
        note = json.dumps([count, words])
        _in_time(lambda: self._store.set(note_key(self._me), note))

    def say_gone(self) -> None:
        """Takes it back."""
        _in_time(lambda: self._store.set(note_key(self._me), json.dumps(None)))

    def call(self, count: int, words: str) -> str:
        """Who of the others waits as well, and who does not, in words.

        Takes up to :data:`ROLL_CALL_SECONDS`, in which the others may come to the same end.
        """
        notes: dict[int, tuple[int, str] | None] = {}
        deadline = time.monotonic() + 0.8 * ROLL_CALL_SECONDS

        def look() -> None:
            self._store.set(note_key(self._me), json.dumps([count, words]))
            while time.monotonic() < deadline:
                unheard = [i for i in self._others if notes.get(i) is None]
                if not unheard:
                    return
                for other in unheard:
                    notes[other] = self._note_of(other)
                time.sleep(0.1)

        _in_time(look)
        found = dict(notes)
        if not found:
            return (
                "which processes did not answer is unknown: neither did the store that they met "
                "by, which often lies on process 0"
            )
        silent = [str(i) for i, note in found.items() if note is None]
        result = [f"no word from process {enumerated(silent)}"] if silent else []
        places: dict[str, list[str]] = {}
        for i, note in found.items():
            if note is not None and note[0] != count:
                places.setdefault(note[1], []).append(str(i))
        result += [
            f"process {enumerated(there)} waits in {place}" for place, there in places.items()
        ]
        return "; ".join(result) or "all the others wait there, too"

    def _note_of(self, process: int) -> tuple[int, str] | None:
        if not self._store.check([note_key(process)]):
            return None
        note: tuple[int, str] | None = json.loads(self._store.get(note_key(process)))
        return note


def enumerated(items: Sequence[str], at_most: int = 8) -> str:
    """The first of the items, and how many there are besides."""
    more = f" and {len(items) - at_most} more" if len(items) > at_most else ""
    return ", ".join(items[:at_most]) + more


def _in_time(work: Callable[[], Any]) -> None:
    """Runs `work` in a thread that is left behind: it may be the store that does not answer."""

    def attempt() -> None:
        try:
            work()
        except RuntimeError as error:
            log.debug("the store that the processes met by: %s", error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(ROLL_CALL_SECONDS)


def note_key(process: int) -> str:
    """Where in the store the note of a process of the job lies."""
    return f"arg_dist/waits/{process}"
