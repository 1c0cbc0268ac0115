"""Starts a job on several machines, which all run the same command and find each other.

``python -m launchers.cluster [OPTIONS] SCRIPT [ARGS...]`` is node k of n. The nodes rendezvous at a
store on node 0, compare what they are about to run, and then each starts its launcher: torchrun,
deepspeed or accelerate. Nothing here needs ssh. See :mod:`launchers.cluster.cli` for the options.
"""

from __future__ import annotations


class ClusterError(RuntimeError):
    """The nodes cannot work together; the message is shown to the user.

    `code` is the exit code: 2 if an input is invalid, 1 if a node is missing.
    """

    def __init__(self, message: str, *, code: int = 1) -> None:
        super().__init__(message)
        self.code = code
