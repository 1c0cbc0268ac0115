"""The messages of a round: one per pair of processes, with the rows of all exchanges.

First comes what even exchanges send to everyone, which is as long in all messages, then what goes
to home processes or comes from them, then all else, each in the order of the exchanges. So most of
the messages is a matrix with a row for each process, packed and unpacked by columns: neither what
is done in Python nor the number of kernels grows with the number of processes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from arg_dist.sharding.routing import (
    Kind,
    Route,
    padded_positions,
    route,
    route_of_pieces,
    whole_positions,
)
from arg_dist.sharding.transfers import ALIGNMENT, moved_to, moved_together
from arg_dist.subspace.distributed import Exchange, add_up, put_together, summed_in_order


class Item(NamedTuple):
    """An exchange of a round.

    Attributes:
        number: its position.
        exchange: the exchange.
        route: what this process sends and receives.
        part: this process's part, flat, in the type of the messages; padded if it is sent whole.
        width: message elements of a row.
    """

    number: int
    exchange: Exchange
    route: Route
    part: Tensor
    width: int

    @property
    def numel(self) -> int:
        """Message elements of an even part."""
        return self.width * self.route.count

    def parts(self, processes: int) -> Tensor:
        """``processes x numel``: what each process is sent of an even exchange."""
        if self.route.kind is Kind.ALL:
            return self.part.view(1, -1).expand(processes, -1)
        if not self.route.cut:
            return self.part.view(processes, -1)
        positions = padded_positions(self.route, self.part.device)
        rows = self.part.view(self.route.cut[-1][1] - self.route.cut[0][0], self.width)
        return rows.index_select(0, positions).view(processes, self.numel)

    def own(self, me: int, processes: int) -> Tensor:
        """``1 x numel``: what this process contributes to what it wants of an even exchange."""
        if self.route.kind is Kind.TO_HOME:
            return self.part.view(1, -1)
        if self.route.kind is Kind.ALL or not self.route.cut:
            return self.parts(processes)[me : me + 1]
        first, (low, high) = self.route.cut[0][0], self.route.cut[me]
        mine = slice(self.width * (low - first), self.width * (high - first))
        return _padded(self.part[mine], self.numel).view(1, -1)

    def whole(self, parts: Tensor) -> Tensor:
        """``rows * width``: all rows of an even exchange, of ``processes x numel``."""
        if not self.route.cut:
            return parts
        positions = whole_positions(self.route, parts.device)
        return parts.view(len(parts) * self.route.count, self.width).index_select(0, positions)

    def part_of(self, process: int, padded: Tensor) -> Tensor:
        """``several x rows * width``: the part of a process, of ``several x numel``."""
        if not self.route.cut:
            return padded
        low, high = self.route.cut[process]
        return padded[:, : self.width * (high - low)].contiguous()

    def rows(self, flat: Tensor, *several: int) -> Tensor:
        """``several x rows x ...``: message elements, contiguous, as rows of the part's type."""
        part = self.exchange.part
        typed = flat.view(-1).view(part.dtype)
        return typed.view(*several, -1 if typed.numel() else 0, *part.shape[1:])


class Slice(NamedTuple):
    """Rows of one exchange in the message to or from one process, beside those of all processes.

    Attributes:
        item: the exchange.
        first: first message element in this process's part.
        numel: message elements.
    """

    item: Item
    first: int
    numel: int


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
        self._me, self._size, self._device = me, size, device
        devices = {each.part.device for each in exchanges}
        self._packed_on = devices.pop() if len(devices) == 1 else device
        fits_int32 = all(each.part.element_size() % 4 == 0 for each in exchanges)
        self.dtype = torch.int32 if fits_int32 else torch.uint8
        self._unit = ALIGNMENT // self.dtype.itemsize
        self._items = self._sorted(exchanges)
        everyone = [item for item in self._items if item.route.kind in (Kind.PARTS, Kind.ALL)]
        self._sent = everyone + self._at_home(Kind.FROM_HOME)
        self._received = everyone + self._at_home(Kind.TO_HOME)
        self._more_sent, self._more_received = self._slices()
        self.send_sizes = self._sizes(self._sent, self._more_sent)
        self.receive_sizes = self._sizes(self._received, self._more_received)

    def _sorted(self, exchanges: Sequence[Exchange]) -> list[Item]:
        routes = [route(each.have, each.want, self._me) for each in exchanges]
        if {Kind.TO_HOME, Kind.FROM_HOME} <= {each.kind for each in routes}:
            # only one of them leaves what is equal at the start of the messages
            for k, exchange in enumerate(exchanges):
                if routes[k].kind is Kind.FROM_HOME:
                    routes[k] = route_of_pieces(exchange.have, exchange.want, self._me)
        return [
            self._item(k, exchange, each)
            for k, (exchange, each) in enumerate(zip(exchanges, routes, strict=True))
        ]

    def _item(self, number: int, exchange: Exchange, route: Route) -> Item:
        part, width = self._flat(exchange.part), self._width(exchange.part)
        if route.kind in (Kind.ALL, Kind.TO_HOME):
            part = _padded(part, width * route.count)
        return Item(number, exchange, route, part, width)

    def _at_home(self, kind: Kind) -> list[Item]:
        """Exchanges of a kind whose home process this is."""
        found = (item for item in self._items if item.route.kind is kind)
        return [item for item in found if item.route.home == self._me]

    def _slices(self) -> tuple[Mapping[int, list[Slice]], Mapping[int, list[Slice]]]:
        """What is sent to some processes only, and received from some, by process."""
        sent: dict[int, list[Slice]] = defaultdict(list)
        received: dict[int, list[Slice]] = defaultdict(list)
        for item in self._items:
            home, kind = item.route.home, item.route.kind
            if home != self._me and kind is Kind.TO_HOME:
                sent[home].append(Slice(item, 0, item.numel))
            if home != self._me and kind is Kind.FROM_HOME:
                received[home].append(Slice(item, 0, item.numel))
        for item in self._items:
            if item.route.kind is not Kind.ANY:
                continue
            width, first = item.width, item.exchange.have[self._me][0]
            for process, low, high in item.route.outgoing:
                sent[process].append(Slice(item, width * (low - first), width * (high - low)))
            for process, low, high in item.route.incoming:
                if process != self._me:
                    received[process].append(Slice(item, 0, width * (high - low)))
        return sent, received

    def _sizes(self, columns: Sequence[Item], more: Mapping[int, list[Slice]]) -> list[int]:
        sizes = [self._columns(columns)] * self._size
        sizes[self._me] = 0
        for process, slices in more.items():
            sizes[process] += sum(self._padded(each.numel) for each in slices)
        return sizes

    def _columns(self, items: Sequence[Item]) -> int:
        return sum(self._padded(item.numel) for item in items)

    def packed(self) -> Tensor:
        """All messages to other processes, concatenated."""
        items = self._on_one_device()
        message = torch.empty(sum(self.send_sizes), dtype=self.dtype, device=self._packed_on)
        zeros = torch.zeros(1, self._unit, dtype=self.dtype, device=self._packed_on)
        parts = []
        for item in self._sent:
            parts.append(items[item.number].parts(self._size))
            gap = self._padded(item.numel) - item.numel
            if gap:
                parts.append(zeros[:, :gap].expand(self._size, -1))
        filled = 0
        for first, last in self._runs(self._more_sent):
            slices = self._more_sent.get(first, []) if last == first + 1 else []
            numel = sum(self.send_sizes[first:last])
            there = message[filled : filled + numel].view(last - first, -1)
            filled += numel
            pieces = [rows[first:last] for rows in parts]
            for each in slices:
                part = items[each.item.number].part
                pieces.append(part[None, each.first : each.first + each.numel])
                pieces.append(zeros[:, : self._padded(each.numel) - each.numel])
            if numel:
                torch.cat(pieces, 1, out=there)
        return message if message.device == self._device else moved_to(message, self._device)

    def _on_one_device(self) -> list[Item]:
        """The exchanges, with their parts where they are packed."""
        there = [self._packed_on] * len(self._items)
        moved = moved_together([item.part for item in self._items], there)
        return [item._replace(part=part) for item, part in zip(self._items, moved, strict=True)]

    def _runs(self, more: Mapping[int, list[Slice]]) -> Iterator[tuple[int, int]]:
        """Runs of other processes, in order, whose messages are alike; one by one if `more` is."""
        first = 0
        for process in sorted({self._me, *more}):
            if first < process:
                yield first, process
            if process != self._me:
                yield process, process + 1
            first = process + 1
        if first < self._size:
            yield first, self._size

    def answers(self, received: Tensor) -> list[Tensor]:
        """For each exchange, the rows that this process wants, on the device of its part.

        Args:
            received: all messages from other processes, concatenated.
        """
        starts = accumulate((self._padded(item.numel) for item in self._received), initial=0)
        columns = {item.number: start for item, start in zip(self._received, starts, strict=False)}
        arrived = {
            device: self._unpacked(
                received if received.device == device else moved_to(received, device)
            )
            for device in dict.fromkeys(item.part.device for item in self._items)
        }
        answers = []
        for item in self._items:
            blocks, pieces = arrived[item.part.device]
            if item.number in columns:
                start = columns[item.number]
                mine = [(first, rows[:, start : start + item.numel]) for first, rows in blocks]
                answers.append(self._of_all(item, mine))
            else:
                answers.append(self._of_some(item, pieces[item.number]))
        return answers

    def _unpacked(
        self, received: Tensor
    ) -> tuple[list[tuple[int, Tensor]], Mapping[int, list[Tensor]]]:
        """Runs of rows of the matrix by their first process; and pieces by exchange, in order."""
        width, filled = self._columns(self._received), 0
        blocks: list[tuple[int, Tensor]] = []
        pieces: dict[int, list[Tensor]] = defaultdict(list)
        for first, last in self._runs(self._more_received):
            numel = sum(self.receive_sizes[first:last])
            rows = received[filled : filled + numel].view(last - first, -1)
            filled += numel
            blocks.append((first, rows[:, :width]))
            start = width
            for each in self._more_received.get(first, []) if last == first + 1 else []:
                pieces[each.item.number].append(rows[0, start : start + each.numel])
                start += self._padded(each.numel)
        return blocks, pieces

    def _of_all(self, item: Item, blocks: Sequence[tuple[int, Tensor]]) -> Tensor:
        """The answer of an exchange to which all processes have sent equal parts."""
        before = [rows for first, rows in blocks if first < self._me]
        after = [rows for first, rows in blocks if first > self._me]
        own = item.own(self._me, self._size)
        together = torch.cat([*before, own, *after])
        if not item.route.sums:
            return item.rows(item.whole(together))
        if item.route.kind is Kind.PARTS:
            together = item.part_of(self._me, together)
        stack = item.rows(together, self._size)
        return stack if item.exchange.stacked else summed_in_order(stack)

    def _of_some(self, item: Item, arrived: Sequence[Tensor]) -> Tensor:
        """The answer of any other exchange; `arrived` are the pieces of other processes."""
        exchange, kind = item.exchange, item.route.kind
        if kind is Kind.TO_HOME:
            return add_up(exchange, self._me, [])
        if kind is Kind.FROM_HOME:
            padded = arrived[0][None] if arrived else item.own(self._me, self._size)
            return put_together([item.rows(item.part_of(self._me, padded))])
        others, first = iter(arrived), exchange.have[self._me][0]
        pieces = []
        for process, low, high in item.route.incoming:
            own = item.part[item.width * (low - first) : item.width * (high - first)]
            pieces.append(own if process == self._me else next(others))
        if pieces and item.route.tiles and not exchange.stacked:
            return item.rows(put_together(pieces))
        lows = (low for _, low, _ in item.route.incoming)
        return add_up(exchange, self._me, list(zip(lows, map(item.rows, pieces), strict=True)))

    def _flat(self, part: Tensor) -> Tensor:
        return part.contiguous().view(-1).view(self.dtype)

    def _width(self, part: Tensor) -> int:
        """Message elements per row."""
        return math.prod(part.shape[1:]) * part.element_size() // self.dtype.itemsize

    def _padded(self, numel: int) -> int:
        return -(-numel // self._unit) * self._unit


def _padded(part: Tensor, numel: int) -> Tensor:
    """``numel``: a flat part, followed by zeros."""
    gap = numel - part.numel()
    return torch.cat([part, part.new_zeros(gap)]) if gap else part
