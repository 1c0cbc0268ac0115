"""A pool of processes that live as long as the test run: their start is paid once.

Each waits for a function and its arguments, runs it with the process group of the first N of them,
and sends back what it returned or its traceback. Rendezvous is a file, so no port is taken.
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.patience import patient

START_SECONDS = 90
COLLECTIVE_SECONDS = 20
"""How long a process waits for another one inside a collective."""
GRACE_SECONDS = 3
"""How long the others may take to end once one has failed."""


class ProcessPool:
    """Up to `size` processes that run functions together.

    A failure or a hang of one process ends the processes; the next call starts new ones.

    Args:
        size: how many.
        context: how they start; by default as fresh interpreters, into which no threads, locks or
            hash seeds of this one are copied.
    """

    def __init__(self, size: int, context: BaseContext | None = None) -> None:
        self.size = size
        self._context = context or multiprocessing.get_context("spawn")
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(
        self,
        function: Callable[..., Any],
        processes: int,
        *arguments: Any,
        seconds: float = COLLECTIVE_SECONDS + 10,
    ) -> list[Any]:
        """``function(group, *arguments)`` on the first `processes` of the pool; all their results.

        Args:
            function: a function at the top of a module.
            processes: how many take part.
            arguments: passed on to each of them, pickled.
            seconds: time limit.

        Raises:
            RuntimeError: with the traceback of the first process that raised.
            TimeoutError: naming the processes that have not answered.
        """
        if not self._workers:
            self._start()
        for _, connection in self._workers[:processes]:
            connection.send_bytes(pickle.dumps((function, processes, arguments)))
        try:
            return self._collect(processes, seconds)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        if self._workers:
            self._directory.cleanup()
        self._workers = []

    def _start(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="pool-")
        store = Path(self._directory.name) / "rendezvous"
        for index in range(self.size):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_work, args=(index, self.size, str(store), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        try:
            self._collect(self.size, START_SECONDS)
        except BaseException:
            self.close()
            raise

    def _collect(self, processes: int, seconds: float) -> list[Any]:
        deadline = time.monotonic() + patient(seconds)
        waiting = {connection: i for i, (_, connection) in enumerate(self._workers[:processes])}
        results: list[Any] = [None] * processes
        failures: list[str] = []
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                index = waiting.pop(connection)
                try:
                    succeeded, results[index] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    succeeded, results[index] = False, "the process has ended"
                if not succeeded:
                    failures.append(f"process {index}: {results[index]}")
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failures:
            raise RuntimeError("\n".join(failures))
        if waiting:
            raise TimeoutError(
                f"processes {sorted(waiting.values())} of {processes} have not answered in "
                f"{seconds:g} seconds: probably they wait for each other in a collective"
            )
        return results


def _work(index: int, size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=index,
        world_size=size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    groups = {count: dist.new_group(range(count)) for count in range(1, size + 1)}
    connection.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, processes, arguments = pickle.loads(message)
            answer = (True, function(groups[processes], *arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
