"""The only collectives of the optimizer: one all-to-all of bytes per round, one gather at binding.

Whatever a round asks for, for however many matrices, travels in one message per pair of processes;
what a process has for itself is not sent. Sizes follow from the layout, which all owners know, so
no sizes are exchanged and nothing waits for the host. All of them have a time limit.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions  # nowhere public

from arg_dist.sharding.messages import Messages
from arg_dist.sharding.waiting import Waiting, Words
from arg_dist.subspace.exchange import Exchange

SIZE_BYTES = 8
"""Of the length of an object, which is sent before it."""


def training_group(group: dist.ProcessGroup | str | None) -> dist.ProcessGroup | None:
    """The processes that train one model together; None if there is but one.

    Args:
        group: a process group; "world" for all processes of the job; None for this one alone.

    Raises:
        ValueError: another string.
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
    """The processes of one group, as the drivers see them.

    Args:
        group: the process group; None for a process on its own.
        time_limit: seconds to wait for the others in one collective; None: as long as the group
            does by itself.

    Attributes:
        group: the process group; None for a process on its own.
        time_limit: as given.
        size: number of processes.
        me: this process's index in the group.
        sent_bytes: bytes sent by this process since the start.
        collectives: collectives taken part in since the start.

    Raises:
        NoAnswerError: from every method: others did not come in time, or are gone.
    """

    def __init__(self, group: dist.ProcessGroup | None, time_limit: float | None = None) -> None:
        self.group = group
        self.time_limit = time_limit
        self.size = 1 if group is None else dist.get_world_size(group)
        self.me = 0 if group is None else dist.get_rank(group)
        self.sent_bytes = 0
        self.collectives = 0
        self._device = torch.device("cpu") if group is None else _device_of(group)
        self._waiting = None if group is None else Waiting(group, self._device, time_limit)

    @property
    def processes(self) -> tuple[int, ...]:
        """The processes of the group, by their indexes in the job; none where there is but one."""
        alone = self.group is None or self.size == 1
        return () if alone else tuple(dist.get_process_group_ranks(self.group))

    def gather_objects(
        self, value: Any, purpose: str = "a gathering", *, counted: bool = False
    ) -> list[Any]:
        """Everyone's `value`, in the order of processes; a little plain Python data, not each step.

        Args:
            value: this process's.
            purpose: what for, in the words of an error.
            counted: whether it belongs to the steps, which are counted, unlike what comes before.
        """
        if self.group is None:
            return [value]
        group, mine = self.group, self._pickled(value)
        sizes = self._sizes(mine, purpose)
        longest = torch.zeros(max(sizes), dtype=torch.uint8, device=self._device)
        longest[: mine.numel()] = mine
        received = [torch.empty_like(longest) for _ in sizes]

        def start(limit: timedelta) -> dist.Work:
            options = AllgatherOptions()
            options.timeout, options.asyncOp = limit, True
            return group.allgather([received], [longest], options)

        self._begin(start, lambda: f"{purpose} (an all-gather)")()
        if counted:
            self.sent_bytes += (self.size - 1) * (longest.numel() + SIZE_BYTES)
            self.collectives += 2
        return [_unpickled(data[:size]) for data, size in zip(received, sizes, strict=True)]

    def gather_objects_on_first(self, value: Any, purpose: str = "a gathering") -> list[Any]:
        """Everyone's `value` on the first process, nothing on the others; for checkpoints.

        Args:
            value: this process's.
            purpose: what for, in the words of an error.
        """
        if self.group is None:
            return [value]
        mine = self._pickled(value)
        sizes = self._sizes(mine, purpose)
        expected = sizes if self.me == 0 else [0] * self.size
        data = torch.empty(sum(expected), dtype=torch.uint8, device=self._device)
        to_first = [mine.numel()] + [0] * (self.size - 1)
        self._all_to_all(data, mine, expected, to_first, lambda: f"{purpose} (a gathering)")()
        return [_unpickled(part) for part in torch.split(data, expected)] if self.me == 0 else []

    def exchange(
        self, exchanges: Sequence[Exchange], words: Words = lambda: "an exchange"
    ) -> list[Tensor]:
        """Carries out the requests of one round, all in one all-to-all.

        Args:
            exchanges: this process's requests; two processes list those they share in one order.
            words: what it is for, should somebody wait too long.

        Returns:
            ``want[me]`` rows for each request, on the request's device.
        """
        return self.begin(exchanges, words)()

    def begin(
        self, exchanges: Sequence[Exchange], words: Words = lambda: "an exchange"
    ) -> Callable[[], list[Tensor]]:
        """Sends what one round asks for; arguments as of :meth:`exchange`.

        Returns:
            What waits for the answers and returns them, called once; several exchanges may be
            under way, and all processes begin them in one order.
        """
        messages = Messages(exchanges, self.me, self.size, self._device)
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
        """Begins it; what is returned waits for its end, and holds both messages until then."""
        group = self.group
        assert group is not None

        def start(limit: timedelta) -> dist.Work:
            options = dist.AllToAllOptions()
            options.timeout, options.asyncOp = limit, True
            return group.alltoall_base(receive, send, receive_sizes, send_sizes, options)

        return self._begin(start, lambda: f"{words()} (an all-to-all)")

    def _begin(self, start: Callable[[timedelta], dist.Work], words: Words) -> Callable[[], None]:
        assert self._waiting is not None
        return self._waiting.begin(start, words)

    def _sizes(self, mine: Tensor, purpose: str) -> list[int]:
        """How long everyone's message is."""
        send = torch.full((self.size,), mine.numel(), device=self._device)
        receive = torch.empty_like(send)
        self._all_to_all(receive, send, [1] * self.size, [1] * self.size, lambda: purpose)()
        return [int(size) for size in receive.tolist()]

    def _pickled(self, value: Any) -> Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(self._device)


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Where the group's messages must lie; what is offloaded to the host passes there."""
    if dist.get_backend(group) in ("gloo", "mpi", "ucc"):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _unpickled(data: Tensor) -> Any:
    return pickle.loads(data.cpu().numpy().tobytes())
