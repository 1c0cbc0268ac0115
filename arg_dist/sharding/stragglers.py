"""Finds out which other processes are waiting: processes that wait for long leave notes.

The notes are in the store of the group's rendezvous, which works outside of collectives.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from arg_dist.library_internals import GROUPS

ROLL_CALL_SECONDS = 2.0
"""How long a process whose collective failed looks for notes of the others."""

log = logging.getLogger("arg_dist")


class RollCall:
    """Notes of waiting processes in the rendezvous store.

    Attributes:
        this_process: this process's description for messages.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._me = dist.get_rank()
        self.this_process = f"process {self._me} of {dist.get_world_size()}"
        self._others = [i for i in dist.get_process_group_ranks(group) if i != self._me]
        self._store = _store_of(group)

    def say_here(self, count: int, words: str) -> None:
        """Note that this process waits in its collective number `count`."""
        note = json.dumps([count, words])
        _in_time(lambda: self._store.set(note_key(self._me), note))

    def say_gone(self) -> None:
        """Withdraw this process's note."""
        _in_time(lambda: self._store.set(note_key(self._me), json.dumps(None)))

    def call(self, count: int, words: str) -> str:
        """Describe which other processes wait, where, and which do not respond.

        Takes up to :data:`ROLL_CALL_SECONDS`, during which the others may time out as well.
        """
        notes: dict[int, tuple[int, str] | None] = {}
        deadline = time.monotonic() + 0.8 * ROLL_CALL_SECONDS

        def look() -> None:
            self._store.set(note_key(self._me), json.dumps([count, words]))
            while time.monotonic() < deadline:
                missing = [i for i in self._others if notes.get(i) is None]
                if not missing:
                    return
                for other in missing:
                    notes[other] = self._note_of(other)
                time.sleep(0.1)

        _in_time(look)
        found = dict(notes)
        if not found:
            return (
                "which processes did not respond is unknown, as the rendezvous store (usually on "
                "process 0) did not respond either"
            )
        silent = [str(i) for i, note in found.items() if note is None]
        result = [f"no response from process {enumerated(silent)}"] if silent else []
        places: dict[str, list[str]] = {}
        for i, note in found.items():
            if note is not None and note[0] != count:
                places.setdefault(note[1], []).append(str(i))
        result += [
            f"process {enumerated(there)} waits in {place}" for place, there in places.items()
        ]
        return "; ".join(result) or "all other processes wait there, too"

    def _note_of(self, process: int) -> tuple[int, str] | None:
        if not self._store.check([note_key(process)]):
            return None
        note: tuple[int, str] | None = json.loads(self._store.get(note_key(process)))
        return note


def enumerated(items: Sequence[str], at_most: int = 8) -> str:
    """The first `at_most` items, and the number of the remaining ones."""
    more = f" and {len(items) - at_most} more" if len(items) > at_most else ""
    return ", ".join(items[:at_most]) + more


def _in_time(work: Callable[[], Any]) -> None:
    """Run `work` in a thread, abandoned after a timeout in case the store does not respond."""

    def attempt() -> None:
        try:
            work()
        except RuntimeError as error:
            log.debug("rendezvous store: %s", error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(ROLL_CALL_SECONDS)


def _store_of(group: dist.ProcessGroup) -> Any:
    if hasattr(group, "get_group_store"):
        return group.get_group_store()
    _, store = GROUPS.imported().pg_map[group]  # before torch 2.8
    return store


def note_key(process: int) -> str:
    """Key in the store of a process's note, by its index in the job."""
    return f"arg_dist/waits/{process}"
