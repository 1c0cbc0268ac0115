"""The store on node 0 by which the nodes meet, with a time limit on every word.

It is torch's own, so that torchrun's rendezvous can use it too: one port serves both. A call of it
may block for as long as the network is down, so each runs in a thread that nobody has to wait for.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import DistNetworkError

from arg_dist.cli.parsing import InputError
from launchers.cluster import ClusterError
from launchers.cluster.network import TRY_SECONDS, wait_until_open
from launchers.cluster.place import Place

T = TypeVar("T")

ANSWER_SECONDS = 20.0
PREFIX = "launchers.cluster"


class Notes:
    """Short texts by name, seen by all nodes.

    Methods raise ClusterError if node 0 does not answer in time, or is gone.
    """

    def __init__(self, store: TCPStore, where: str, patience: float = ANSWER_SECONDS) -> None:
        self._whole = store
        self._store = PrefixStore(PREFIX, store)
        self._where = where
        self._patience = patience

    def patient(self, seconds: float) -> Notes:
        """The same notes, for whom a network that is down for less than `seconds` is no fault."""
        return Notes(self._whole, self._where, seconds)

    def check_same(self, own: Notes, place: Place) -> None:
        """Makes sure that these notes, found at `place`, are those of node 0's `own` store.

        Raises:
            InputError: they are another's.
        """
        mark = uuid.uuid4().hex
        own.put("mark", mark)
        if self.read("mark") != mark:
            raise InputError(
                f"MASTER_ADDR={place.address}: leads to another machine, while NODE_RANK=0 says "
                "that this one is node 0; give all nodes the address of node 0"
            )

    def put(self, name: str, text: str) -> None:
        """Leaves a note, in place of an earlier one."""
        self._ask(lambda: self._store.set(name, text))

    def read(self, name: str) -> str | None:
        """A note; None if nobody has left it."""

        def found() -> str | None:
            return self._store.get(name).decode() if self._store.check([name]) else None

        return self._ask(found)

    def put_first(self, name: str, text: str) -> str:
        """Leaves a note unless there is one; returns the one that is there now."""
        return self._ask(lambda: self._store.compare_set(name, "", text).decode())

    def count(self, name: str, more: int = 0) -> int:
        """Adds to a number that begins at 0, and returns it."""
        return self._ask(lambda: self._store.add(name, more))

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return within(self._patience, question)
        except (RuntimeError, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                cause = f"no answer for {self._patience:g} s"
            else:
                cause = "it has ended, or closed the connection"
            raise ClusterError(f"node 0 ({self._where}) is lost: {cause}") from None


def open_store(place: Place, tell: Callable[[str], None]) -> Notes:
    """The store, of which this is node 0.

    Raises:
        InputError: the port is taken.
    """
    try:
        store = TCPStore("localhost", place.port, is_master=True, wait_for_workers=False)
    except DistNetworkError as error:
        cause = "it is in use" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise InputError(
            f"MASTER_PORT={place.port}: node 0 cannot listen there ({cause}); give all nodes "
            "another one, or end what uses it"
        ) from None
    tell(f"listening at port {place.port}")
    return Notes(store, "this node")


def connect(place: Place, seconds: float, tell: Callable[[str], None]) -> Notes:
    """The store on node 0, as soon as it is there.

    Raises:
        ClusterError: it was not there for `seconds`, or something else listens in its place.
    """
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        wait_until_open(place.address, place.port, max(0.0, left), tell)
        try:
            store = within(ANSWER_SECONDS, lambda: _client(place))
            return Notes(store, place.endpoint)
        except (RuntimeError, TimeoutError):
            # Something closed the door again: node 0, which is just ending or beginning.
            if time.monotonic() >= deadline:
                raise ClusterError(
                    f"what listens at {place.endpoint} is not node 0 of this job, or does not "
                    "answer; look at MASTER_ADDR and MASTER_PORT, and at node 0's output"
                ) from None
            time.sleep(1)


def _client(place: Place) -> TCPStore:
    limit = timedelta(seconds=TRY_SECONDS)
    return TCPStore(
        place.address, place.port, is_master=False, wait_for_workers=False, timeout=limit
    )


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises.

    Raises:
        TimeoutError: it has done neither for `seconds`; its thread is left to itself.
    """
    box: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            box.put((work(), None))
        except BaseException as error:
            box.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = box.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
