"""Starts a job on several machines: each runs one command, which finds the others.

``python -m launchers.cluster [OPTIONS] SCRIPT [ARGS...]`` is node k of n. The nodes meet at a store
on node 0, compare what they run, and then each starts its launcher: torchrun, deepspeed or
accelerate. Nothing here needs ssh. See :mod:`launchers.cluster.line` for the options.
"""

from __future__ import annotations


class ClusterError(RuntimeError):
    """The nodes cannot work together; the message is what the user gets to read.

    `code` is the exit code: 2 where something given is wrong, 1 where somebody did not come.
    """

    def __init__(self, message: str, *, code: int = 1) -> None:
        super().__init__(message)
        self.code = code
