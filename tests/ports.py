"""Ports that nothing else takes before a test listens on them."""

from __future__ import annotations

import contextlib
import random
import socket


def free_port() -> int:
    """A port that nobody listens on now, and that no system gives to outgoing connections.

    One that the system chooses could be another program's before this test listens on it.
    """
    while True:
        port = random.SystemRandom().randrange(12_000, 28_000)
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port
