"""The only collectives of the optimizer: one all-to-all of bytes per round, one gather at binding.

Whatever a round asks for, for however many matrices, travels in one message per pair of processes;
what a process has for itself is not sent. Sizes follow from the layout, which all owners know, so
no sizes are exchanged and nothing waits for the host. All of them have a time limit.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions  # nowhere public

from arg_dist.sharding.waiting import Waiting, Words
from arg_dist.subspace.exchange import Exchange, add_up, intersect

_SIZE_BYTES = 8
ALIGNMENT = 8
"""Every tensor in a message starts at a multiple of this, so that it can be viewed as any dtype."""


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
            self.sent_bytes += (self.size - 1) * (longest.numel() + _SIZE_BYTES)
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
        outgoing: list[list[Tensor]] = [[] for _ in range(self.size)]
        incoming: list[list[_Slot]] = [[] for _ in range(self.size)]
        received: list[list[tuple[int, int, Tensor]]] = [[] for _ in exchanges]  # source, low, rows
        for k, exchange in enumerate(exchanges):
            mine, wanted = exchange.have[self.me], exchange.want[self.me]
            for other in range(self.size):
                low, high = intersect(mine, exchange.want[other])
                if low < high:
                    part = exchange.part[low - mine[0] : high - mine[0]]
                    if other == self.me:
                        received[k].append((other, low, part))
                    else:
                        outgoing[other].append(part)
                low, high = intersect(exchange.have[other], wanted)
                if low < high and other != self.me:
                    incoming[other].append(_Slot(other, k, low, high, exchange.part))
        arrivals = self._swap(outgoing, incoming, words)

        def answers() -> list[Tensor]:
            for slot, rows in arrivals():
                received[slot.request].append((slot.source, slot.low, rows))
            return [
                add_up(
                    exchange,
                    self.me,
                    [(low, rows) for _, low, rows in sorted(parts, key=itemgetter(0))],
                )
                for exchange, parts in zip(exchanges, received, strict=True)
            ]

        return answers

    def _swap(
        self, outgoing: list[list[Tensor]], incoming: list[list[_Slot]], words: Words
    ) -> Callable[[], list[tuple[_Slot, Tensor]]]:
        device = self._device
        send_sizes = [sum(_padded(part.nbytes) for part in parts) for parts in outgoing]
        receive_sizes = [sum(_padded(slot.nbytes) for slot in slots) for slots in incoming]
        send = torch.zeros(sum(send_sizes), dtype=torch.uint8, device=device)
        receive = torch.empty(sum(receive_sizes), dtype=torch.uint8, device=device)
        position = 0
        for part in (part for parts in outgoing for part in parts):
            send[position : position + part.nbytes] = _as_bytes(part)
            position += _padded(part.nbytes)
        finish = self._all_to_all(receive, send, receive_sizes, send_sizes, words)
        self.sent_bytes += send.numel()
        self.collectives += 1

        def arrivals() -> list[tuple[_Slot, Tensor]]:
            finish()
            results = []
            position = 0
            for slot in (slot for slots in incoming for slot in slots):
                part = receive[position : position + slot.nbytes].view(slot.like.dtype)
                results.append((slot, part.view(slot.shape).to(slot.like.device)))
                position += _padded(slot.nbytes)
            return results

        return arrivals

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


@dataclass(frozen=True)
class _Slot:
    """Rows `[low, high)` for request number `request`, expected from process `source`."""

    source: int
    request: int
    low: int
    high: int
    like: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.high - self.low, *self.like.shape[1:])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.like.element_size()


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _as_bytes(part: Tensor) -> Tensor:
    return part.contiguous().view(-1).view(torch.uint8)


def _unpickled(data: Tensor) -> Any:
    return pickle.loads(data.cpu().numpy().tobytes())
