"""The store on node 0 for the rendezvous of the nodes, with a time limit on every call.

It is torch's own, so that torchrun's rendezvous can use it too: one port serves both. A call may
block for as long as the network is down, so each runs in a thread that can be abandoned.
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
    """Short texts by key, shared by all nodes.

    Methods raise ClusterError if node 0 does not answer in time, or no longer exists.
    """

    def __init__(self, store: TCPStore, where: str, patience: float = ANSWER_SECONDS) -> None:
        self._whole = store
        self._store = PrefixStore(PREFIX, store)
        self._where = where
        self._patience = patience

    def patient(self, seconds: float) -> Notes:
        """The same notes, which tolerate network outages of less than `seconds`."""
        return Notes(self._whole, self._where, seconds)

    def check_same(self, own: Notes, place: Place) -> None:
        """Checks that these notes, reached through `place`, are node 0's `own`.

        Raises:
            InputError: they are another machine's.
        """
        mark = uuid.uuid4().hex
        own.put("mark", mark)
        if self.read("mark") != mark:
            raise InputError(
                f"MASTER_ADDR={place.address}: leads to another machine, but NODE_RANK=0 makes "
                "this one node 0; set MASTER_ADDR to the address of node 0 on all nodes"
            )

    def put(self, name: str, text: str) -> None:
        """Sets a text, replacing an earlier one."""
        self._ask(lambda: self._store.set(name, text))

    def read(self, name: str) -> str | None:
        """A text; None if it was never set."""

        def found() -> str | None:
            return self._store.get(name).decode() if self._store.check([name]) else None

        return self._ask(found)

    def put_first(self, name: str, text: str) -> str:
        """Sets a text unless the key has one; returns the key's text."""
        return self._ask(lambda: self._store.compare_set(name, "", text).decode())

    def count(self, name: str, more: int = 0) -> int:
        """Adds to a counter that starts at 0, and returns it."""
        return self._ask(lambda: self._store.add(name, more))

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return within(self._patience, question)
        except (RuntimeError, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                cause = f"no answer for {self._patience:g} s"
            else:
                cause = "it has exited, or closed the connection"
            raise ClusterError(f"node 0 ({self._where}) is lost: {cause}") from None


def open_store(place: Place, tell: Callable[[str], None]) -> Notes:
    """Opens the store on this node, node 0.

    Raises:
        InputError: the port is in use.
    """
    try:
        store = TCPStore("localhost", place.port, is_master=True, wait_for_workers=False)
    except DistNetworkError as error:
        cause = "it is in use" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise InputError(
            f"MASTER_PORT={place.port}: node 0 cannot listen on it ({cause}); choose another port "
            "for all nodes, or stop the process that uses it"
        ) from None
    tell(f"listening on port {place.port}")
    return Notes(store, "this node")


def connect(place: Place, seconds: float, tell: Callable[[str], None]) -> Notes:
    """Connects to the store on node 0 as soon as it is open.

    Raises:
        ClusterError: it did not open within `seconds`, or another program listens there.
    """
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        wait_until_open(place.address, place.port, max(0.0, left), tell)
        try:
            store = within(ANSWER_SECONDS, lambda: _client(place))
            return Notes(store, place.endpoint)
        except (RuntimeError, TimeoutError):
            # The connection was closed again: node 0 may be just starting or exiting.
            if time.monotonic() >= deadline:
                raise ClusterError(
                    f"the server at {place.endpoint} is not node 0 of this job, or does not "
                    "answer; check MASTER_ADDR and MASTER_PORT, and node 0's output"
                ) from None
            time.sleep(1)


def _client(place: Place) -> TCPStore:
    limit = timedelta(seconds=TRY_SECONDS)
    return TCPStore(
        place.address, place.port, is_master=False, wait_for_workers=False, timeout=limit
    )


def within(seconds: float, work: Callable[[], T]) -> T:
    """Runs `work` with a time limit; returns or raises what it does.

    Raises:
        TimeoutError: it did neither within `seconds`; its thread is abandoned.
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
