"""The messages of a round: one per pair of processes, with the rows of all exchanges.

The pieces of a message are in the order of the exchanges. Their number is that of processes times
matrices, so all of them are joined and split by a few operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from arg_dist.sharding.routing import Route, route
from arg_dist.sharding.transfers import gathered, spread_out
from arg_dist.subspace.distributed import Exchange, add_up, put_together

ALIGNMENT = 8
"""Byte alignment of each piece, so that it can be viewed as any dtype."""


class Messages:
    """The messages of one round.

    Args:
        exchanges: the round's exchanges.
        me: this process's index.
        size: number of processes.
        device: device of the messages.

    Attributes:
        dtype: dtype of the messages.
        send_sizes: elements sent to each process.
        receive_sizes: elements received from each process.
    """

    def __init__(
        self, exchanges: Sequence[Exchange], me: int, size: int, device: torch.device
    ) -> None:
        self._exchanges, self._me, self._device = exchanges, me, device
        self._routes = [route(each.have, each.want, me) for each in exchanges]
        fits_int32 = all(each.part.element_size() % 4 == 0 for each in exchanges)
        self.dtype = torch.int32 if fits_int32 else torch.uint8
        self._unit = ALIGNMENT // self.dtype.itemsize
        self.send_sizes = [0] * size
        # from each process: exchange and number of elements of each piece, in message order
        self._slots: list[list[tuple[int, int]]] = [[] for _ in range(size)]
        for k, (exchange, each) in enumerate(self._both()):
            width = self._width(exchange.part)
            for process, low, high in each.outgoing:
                self.send_sizes[process] += self._padded(width * (high - low))
            for process, low, high in each.incoming:
                if process != me:
                    self._slots[process].append((k, width * (high - low)))
        self.receive_sizes = [
            sum(self._padded(numel) for _, numel in slots) for slots in self._slots
        ]

    def packed(self) -> Tensor:
        """All messages to other processes, concatenated."""
        devices = {self._device, *(each.part.device for each in self._exchanges)}
        zeros = {
            device: torch.zeros(self._unit, dtype=self.dtype, device=device) for device in devices
        }
        pieces: list[list[Tensor]] = [[] for _ in self.send_sizes]
        same_for_all = bool(self._routes) and all(each.is_for_all for each in self._routes)
        for exchange, each in self._both():
            flat, width = self._flat(exchange.part), self._width(exchange.part)
            first = exchange.have[self._me][0]
            for process, low, high in each.outgoing[:1] if same_for_all else each.outgoing:
                piece = flat[width * (low - first) : width * (high - first)]
                gap = self._padded(piece.numel()) - piece.numel()
                pieces[process] += [piece, zeros[piece.device][:gap]] if gap else [piece]
        nothing = zeros[self._device][:0]
        message = gathered(list(chain.from_iterable(pieces)) or [nothing], self._device)
        return message.repeat(len(self.send_sizes) - 1) if same_for_all else message

    def answers(self, received: Tensor) -> list[Tensor]:
        """For each exchange, the rows that this process wants, on the device of its part.

        Args:
            received: all messages from other processes, concatenated.
        """
        arrived = self._unpacked(received)
        return [
            self._answer(exchange, each, pieces)
            for (exchange, each), pieces in zip(self._both(), arrived, strict=True)
        ]

    def _unpacked(self, received: Tensor) -> list[list[Tensor]]:
        """For each exchange, the pieces from other processes, in their order."""
        arrived: list[list[Tensor]] = [[] for _ in self._exchanges]
        in_order = list(chain.from_iterable(self._slots))
        places = torch.split_with_sizes(received, [self._padded(numel) for _, numel in in_order])
        devices = [self._exchanges[k].part.device for k, _ in in_order]
        for (k, numel), place in zip(in_order, spread_out(received, places, devices), strict=True):
            arrived[k].append(place if place.numel() == numel else place[:numel])
        return arrived

    def _answer(self, exchange: Exchange, each: Route, arrived: list[Tensor]) -> Tensor:
        others, part = iter(arrived), exchange.part
        first, width = exchange.have[self._me][0], self._width(part)
        pieces = []
        for process, low, high in each.incoming:
            if process == self._me:
                flat = self._flat(part)
                pieces.append(flat[width * (low - first) : width * (high - first)])
            else:
                pieces.append(next(others))

        def rows(piece: Tensor) -> Tensor:
            typed = piece.view(part.dtype)
            return typed.view(-1 if typed.numel() else 0, *part.shape[1:])

        if pieces and each.tiles and not exchange.stacked:
            return rows(put_together(pieces))
        lows = (low for _, low, _ in each.incoming)
        return add_up(exchange, self._me, list(zip(lows, map(rows, pieces), strict=True)))

    def _both(self) -> Iterator[tuple[Exchange, Route]]:
        return zip(self._exchanges, self._routes, strict=True)

    def _flat(self, part: Tensor) -> Tensor:
        return part.contiguous().view(-1).view(self.dtype)

    def _width(self, part: Tensor) -> int:
        """Message elements per row."""
        return math.prod(part.shape[1:]) * part.element_size() // self.dtype.itemsize

    def _padded(self, numel: int) -> int:
        return -(-numel // self._unit) * self._unit
