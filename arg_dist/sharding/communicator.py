"""The optimizer's only collectives: one all-to-all per round, and gathers of small Python objects.

All requests of a round, for any number of matrices, are batched into one message per pair of
processes; a process sends nothing to itself. Message sizes follow from the layout, which all owners
know, so sizes are not exchanged and the device is not synchronized. Every collective has a time
limit.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from arg_dist.library_internals import ALLGATHER_OPTIONS
from arg_dist.sharding.fragment import Holding
from arg_dist.sharding.message_device import message_device
from arg_dist.sharding.message_packing import Messages
from arg_dist.sharding.timeouts import Waiting, Words
from arg_dist.subspace.distributed import Exchange

SIZE_BYTES = 8
"""Size of an object's length, which is sent before the object."""


def training_group(group: dist.ProcessGroup | str | None) -> dist.ProcessGroup | None:
    """The process group that trains one model together; None for a single process.

    Args:
        group: a process group; "world" for all processes of the job; None for this process alone.

    Raises:
        ValueError: `group` is any other string.
    """
    if isinstance(group, str) and group != "world":
        raise ValueError(
            f'process_group: got {group!r}; a process group, "world" or None is needed'
        )
    if group is None or not dist.is_available() or not dist.is_initialized():
        return None
    chosen = dist.group.WORLD if isinstance(group, str) else group
    return chosen if dist.get_world_size(chosen) > 1 else None


class Communicator:
    """Collectives of one process group.

    Args:
        group: the process group; None for a single process.
        time_limit: seconds to wait for the other processes in one collective; None: the group's
            own timeout.
        holdings: the fragments that the processes share, which lie on the device of the messages.
        known: the device of the messages if there are no fragments.

    Attributes:
        group: the process group; None for a single process.
        time_limit: as passed.
        device: the device of the messages; tensors elsewhere are copied to it.
        size: number of processes.
        me: this process's index in the group.
        sent_bytes: bytes sent by this process so far.
        collectives: collectives of this process so far.

    Raises:
        NoAnswerError: from every method: other processes did not join in time, or have terminated.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        time_limit: float | None = None,
        holdings: Sequence[Holding] = (),
        known: torch.device | None = None,
    ) -> None:
        self.group = group
        self.time_limit = time_limit
        self.size = 1 if group is None else dist.get_world_size(group)
        self.me = 0 if group is None else dist.get_rank(group)
        self.sent_bytes = 0
        self.collectives = 0
        self.device = torch.device("cpu")
        self._waiting: Waiting | None = None
        if group is not None:
            self.device = message_device(group, holdings, known)
            self._waiting = Waiting(group, self.device, time_limit)

    @property
    def processes(self) -> tuple[int, ...]:
        """Indexes in the job of the group's processes; empty for a single process."""
        is_single = self.group is None or self.size == 1
        return () if is_single else tuple(dist.get_process_group_ranks(self.group))

    def gather_objects(
        self, value: Any, purpose: str = "a gather", *, counted: bool = False
    ) -> list[Any]:
        """Gather `value` from all processes, in their order; for small objects, not every step.

        Args:
            value: this process's value.
            purpose: description for error messages.
            counted: include it in the communication statistics, which cover only the steps.
        """
        if self.group is None:
            return [value]
        group, mine = self.group, self._pickled(value)
        sizes = self._sizes(mine, purpose)
        longest = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        longest[: mine.numel()] = mine
        received = [torch.empty_like(longest) for _ in sizes]

        def start(limit: timedelta) -> dist.Work:
            options = _limited(ALLGATHER_OPTIONS.imported()(), limit)
            return group.allgather([received], [longest], options)

        self._begin(start, lambda: f"{purpose} (an all-gather)")()
        if counted:
            self.sent_bytes += (self.size - 1) * (longest.numel() + SIZE_BYTES)
            self.collectives += 2
        return [_unpickled(data[:size]) for data, size in zip(received, sizes, strict=True)]

    def gather_objects_on_first(self, value: Any, purpose: str = "a gather") -> list[Any]:
        """Gather `value` from all processes on the first; empty on the others; for checkpoints.

        Args:
            value: this process's value.
            purpose: description for error messages.
        """
        if self.group is None:
            return [value]
        mine = self._pickled(value)
        sizes = self._sizes(mine, purpose)
        expected = sizes if self.me == 0 else [0] * self.size
        data = torch.empty(sum(expected), dtype=torch.uint8, device=self.device)
        to_first = [mine.numel()] + [0] * (self.size - 1)
        self._all_to_all(data, mine, expected, to_first, lambda: f"{purpose} (a gather)")()
        return [_unpickled(part) for part in torch.split(data, expected)] if self.me == 0 else []

    def exchange(
        self, exchanges: Sequence[Exchange], words: Words = lambda: "an exchange"
    ) -> list[Tensor]:
        """Carry out all requests of one round in one all-to-all.

        Args:
            exchanges: this process's requests; any two processes list shared ones in the same
                order.
            words: returns the purpose for error messages.

        Returns:
            ``want[me]`` rows for each request, on the request's device.
        """
        return self.begin(exchanges, words)()

    def begin(
        self, exchanges: Sequence[Exchange], words: Words = lambda: "an exchange"
    ) -> Callable[[], list[Tensor]]:
        """Start the all-to-all of one round asynchronously; arguments as in :meth:`exchange`.

        Several exchanges may be in flight; all processes start them in the same order.

        Returns:
            A function that waits for the answers and returns them; to be called once.
        """
        messages = Messages(exchanges, self.me, self.size, self.device)
        send = messages.packed()
        receive = send.new_empty(sum(messages.receive_sizes))
        finish = self._all_to_all(receive, send, messages.receive_sizes, messages.send_sizes, words)
        self.sent_bytes += send.nbytes
        self.collectives += 1

        def answers() -> list[Tensor]:
            finish()
            return messages.answers(receive)

        return answers

    def _all_to_all(
        self,
        receive: Tensor,
        send: Tensor,
        receive_sizes: list[int],
        send_sizes: list[int],
        words: Words,
    ) -> Callable[[], None]:
        """Start an all-to-all; the returned function waits, and keeps both buffers alive."""
        group = self.group
        assert group is not None

        def start(limit: timedelta) -> dist.Work:
            options = _limited(dist.AllToAllOptions(), limit)
            return group.alltoall_base(receive, send, receive_sizes, send_sizes, options)

        return self._begin(start, lambda: f"{words()} (an all-to-all)")

    def _begin(self, start: Callable[[timedelta], dist.Work], words: Words) -> Callable[[], None]:
        assert self._waiting is not None
        return self._waiting.begin(start, words)

    def _sizes(self, mine: Tensor, purpose: str) -> list[int]:
        """Exchange the message sizes of all processes."""
        send = torch.full((self.size,), mine.numel(), dtype=torch.int64, device=self.device)
        receive = torch.empty_like(send)
        self._all_to_all(receive, send, [1] * self.size, [1] * self.size, lambda: purpose)()
        return [int(size) for size in receive.tolist()]

    def _pickled(self, value: Any) -> Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(self.device)


def _limited(options: Any, limit: timedelta) -> Any:
    """Options of a collective that returns at once and fails after `limit`."""
    options.timeout = limit
    if hasattr(options, "asyncOp"):  # before torch 2.8, an all-to-all has no choice
        options.asyncOp = True
    return options


def _unpickled(data: Tensor) -> Any:
    return pickle.loads(data.cpu().numpy().tobytes())
