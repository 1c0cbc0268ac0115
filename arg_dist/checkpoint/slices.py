"""Read any part of a tensor from the slices that several processes wrote."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arg_dist.checkpoint.index import (
    CheckpointError,
    Index,
    SlicedTensor,
    StateEntry,
    Weight,
    file_name,
    tensor_key,
)
from arg_dist.sharding.fragment import Box
from arg_dist.subspace.distributed import Interval, intersect, row_count

BLOCK_ELEMENTS = 1 << 18
"""Elements transposed at a time, which limits the temporary memory."""


class SliceReader:
    """Reads the files of one checkpoint, opened on demand; a context manager."""

    def __init__(self, checkpoint: Path, index: Index) -> None:
        self.index = index
        self._checkpoint = checkpoint
        self._files: dict[int, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> SliceReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.clear()
        self._stack.close()

    def rows(self, sliced: SlicedTensor, key: str, wanted: Interval) -> Tensor:
        """Reads rows `wanted` of a tensor, to the CPU.

        Args:
            sliced: the tensor's slices.
            key: name of the slices in their files.
            wanted: ``[start, stop)``.

        Raises:
            CheckpointError: a slice is not where the index places it, or rows are missing.
        """
        return self.box(sliced, key, (wanted,))

    def box(self, sliced: SlicedTensor, key: str, wanted: Box) -> Tensor:
        """Reads a box of a tensor, to the CPU.

        Args:
            sliced: the tensor's slices.
            key: name of the slices in their files.
            wanted: ``[start, stop)`` in as many leading dimensions as its slices have.

        Raises:
            CheckpointError: a slice is not where the index places it, or elements are missing.
        """
        sizes = tuple(map(row_count, wanted))
        values = torch.empty(
            (*sizes, *sliced.shape[len(sizes) :]), dtype=getattr(torch, sliced.dtype), device="cpu"
        )
        filled = 0
        for process, *bounds in sliced.slices:
            there = tuple(zip(bounds[::2], bounds[1::2], strict=True))
            common = tuple(map(intersect, there, wanted))
            if all(first < last for first, last in common):
                values[within(common, wanted)] = self._slice(process, key)[within(common, there)]
                filled += math.prod(map(row_count, common))
        if filled != math.prod(sizes):
            raise CheckpointError(
                f"{self._checkpoint}: {key} has {filled} of the {math.prod(sizes)} rows or "
                f"elements in {' x '.join(f'{start} to {stop}' for start, stop in wanted)}; its "
                "index does not match its files; use another checkpoint"
            )
        return values

    def elements(
        self, entry: StateEntry | Weight, sliced: SlicedTensor, key: str, wanted: Box, *,
        transposed: bool,
    ) -> Tensor:  # fmt: skip
        """Reads a range of a tensor's elements, or a box of it, in whatever form it is stored.

        Args:
            entry: the tensor's entry in the index.
            sliced: the tensor's slices.
            key: name of the slices in their files.
            wanted: ``[start, stop)`` among the elements, or in each dimension.
            transposed: whether `wanted` counts the elements in column-major order.

        Returns:
            Of a range ``stop - start`` elements, of a box its elements in its shape, on the CPU.
        """
        if len(sliced.shape) == len(wanted) and entry.transposed == transposed:
            return self.box(sliced, key, wanted)
        if len(wanted) > 1:
            return self._box_of(entry, sliced, key, wanted)
        ((start, stop),) = wanted
        if start >= stop:
            return torch.empty(0, dtype=getattr(torch, sliced.dtype), device="cpu")
        # the rows, or columns, that the range touches
        each = math.prod(entry.shape) // entry.shape[transposed]
        touched, everything = (start // each, -(-stop // each)), [(0, size) for size in entry.shape]
        everything[transposed] = touched
        rows = self._box_of(entry, sliced, key, tuple(everything))
        first = touched[0] * each
        values = (rows.T if transposed else rows).reshape(-1)[start - first : stop - first]
        return values if values.numel() == rows.numel() else values.clone()

    def _box_of(
        self, entry: StateEntry | Weight, sliced: SlicedTensor, key: str, wanted: Box
    ) -> Tensor:
        """Reads a box of a tensor of the model's shape, which may be stored flattened."""
        if len(sliced.shape) == len(wanted):
            return self.box(sliced, key, wanted)
        values = torch.empty(
            tuple(map(row_count, wanted)), dtype=getattr(torch, sliced.dtype), device="cpu"
        )
        # in the order in which the elements are stored: a few rows at a time
        order = -1 if entry.transposed else 1
        shape, (rows, *rest), target = entry.shape[::order], wanted[::order], values
        if entry.transposed:
            target = values.T
        each = math.prod(shape[1:])
        step = max(1, BLOCK_ELEMENTS // max(1, each))
        for low in range(*rows, step):
            high = min(low + step, rows[1])
            block = self.rows(sliced, key, (low * each, high * each)).view(-1, *shape[1:])
            part = block[(slice(None), *(slice(*bounds) for bounds in rest))]
            target[low - rows[0] : high - rows[0]] = part
        return values

    def random_states(self, process: int) -> dict[str, Tensor]:
        """Reads the random number generator states that a process wrote."""
        keys = {name: tensor_key("random", name) for name in self.index.random_states}
        return {name: self._slice(process, key)[:] for name, key in keys.items()}

    def _slice(self, process: int, key: str) -> Any:
        name = file_name(process, self.index.world_size)
        try:
            if process not in self._files:
                opened = safe_open(self._checkpoint / name, framework="pt")
                self._files[process] = self._stack.enter_context(opened)
            return self._files[process].get_slice(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self._checkpoint / name}: {key} cannot be read ({error}); use another checkpoint"
            ) from None


def within(part: Box, whole: Box) -> tuple[slice, ...]:
    """Where a box lies in a larger one."""
    return tuple(
        slice(low - start, high - start)
        for (low, high), (start, _) in zip(part, whole, strict=True)
    )
