"""Ports that nothing else takes before a test listens on them."""

from __future__ import annotations

import contextlib
import os
import random
import socket

FIRST, EACH = 10_000, 2_000
"""Ports below those that the system gives to outgoing connections, in one range for each worker."""

_given: set[int] = set()


def free_port() -> int:
    """A port that nobody listens on now, at any address, and neither on the next one.

    A launcher of two nodes takes both. One that the system chooses, or another worker of this test
    run, could be another program's before this test listens on it. Never the same one twice: a test
    may ask for several before it listens on the first.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw7").removeprefix("gw"))
    first = FIRST + EACH * (worker % 8)
    while True:
        port = random.SystemRandom().randrange(first, first + EACH - 1)
        both = {port, port + 1}
        if both.isdisjoint(_given) and _can_listen(port) and _can_listen(port + 1):
            _given.update(both)
            return port


def _can_listen(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_server(("", port)):
        return True
    return False
