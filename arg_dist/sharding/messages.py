"""What processes send each other in a round: one message to each, with its rows of all exchanges.

The pieces of a message follow each other as the exchanges do. There are as many as processes times
matrices: they are joined and split by a few operations for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from arg_dist.sharding.routes import Route, route
from arg_dist.subspace.exchange import Exchange, add_up, put_together

ALIGNMENT = 8
"""Every piece starts at a multiple of this many bytes, so that it can be viewed as any dtype."""


class Messages:
    """The messages of one round.

    Args:
        exchanges: what is asked for.
        me: this process.
        size: number of processes.
        device: where messages lie.

    Attributes:
        dtype: of messages.
        send_sizes: elements for each process.
        receive_sizes: elements from each process.
    """

    def __init__(
        self, exchanges: Sequence[Exchange], me: int, size: int, device: torch.device
    ) -> None:
        self._exchanges, self._me, self._device = exchanges, me, device
        self._routes = [route(each.have, each.want, me) for each in exchanges]
        in_words = all(each.part.element_size() % 4 == 0 for each in exchanges)
        self.dtype = torch.int32 if in_words else torch.uint8
        self._unit = ALIGNMENT // self.dtype.itemsize
        self.send_sizes = [0] * size
        # from each process: the exchange and the elements of its pieces, as they lie in its message
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
        """All messages to others, one behind the other."""
        padding = torch.zeros(self._unit, dtype=self.dtype, device=self._device)
        pieces: list[list[Tensor]] = [[] for _ in self.send_sizes]
        alike = bool(self._routes) and all(each.is_for_all for each in self._routes)
        for exchange, each in self._both():
            flat, width = self._flat(exchange.part), self._width(exchange.part)
            first = exchange.have[self._me][0]
            for process, low, high in each.outgoing[:1] if alike else each.outgoing:
                piece = flat[width * (low - first) : width * (high - first)]
                gap = self._padded(piece.numel()) - piece.numel()
                pieces[process] += [piece, padding[:gap]] if gap else [piece]
        message = torch.cat([padding[:0], *chain.from_iterable(pieces)])
        return message.repeat(len(self.send_sizes) - 1) if alike else message

    def answers(self, received: Tensor) -> list[Tensor]:
        """For each exchange, the rows that this process wants, on the device of its part.

        Args:
            received: all messages from others, one behind the other.
        """
        arrived = self._unpacked(received)
        return [
            self._answer(exchange, each, pieces)
            for (exchange, each), pieces in zip(self._both(), arrived, strict=True)
        ]

    def _unpacked(self, received: Tensor) -> list[list[Tensor]]:
        """For each exchange, the pieces from others, in the order of processes."""
        arrived: list[list[Tensor]] = [[] for _ in self._exchanges]
        in_order = list(chain.from_iterable(self._slots))
        places = torch.split_with_sizes(received, [self._padded(numel) for _, numel in in_order])
        for (k, numel), place in zip(in_order, places, strict=True):
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
            typed = piece.to(part.device).view(part.dtype)
            return typed.view(-1 if typed.numel() else 0, *part.shape[1:])

        if pieces and each.tiles:
            return rows(put_together(pieces))
        lows = (low for _, low, _ in each.incoming)
        return add_up(exchange, self._me, list(zip(lows, map(rows, pieces), strict=True)))

    def _both(self) -> Iterator[tuple[Exchange, Route]]:
        return zip(self._exchanges, self._routes, strict=True)

    def _flat(self, part: Tensor) -> Tensor:
        return part.contiguous().view(-1).view(self.dtype).to(self._device)

    def _width(self, part: Tensor) -> int:
        """Elements of a message that a row takes."""
        return math.prod(part.shape[1:]) * part.element_size() // self.dtype.itemsize

    def _padded(self, numel: int) -> int:
        return -(-numel // self._unit) * self._unit
