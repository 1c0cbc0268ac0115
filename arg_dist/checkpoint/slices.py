"""Reading: any rows of a tensor, out of the slices in which other processes wrote it."""

from __future__ import annotations

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
from arg_dist.subspace.exchange import Interval, intersect

BLOCK_ELEMENTS = 1 << 18
"""What is turned from one order to the other at a time; more would need more memory."""


class SliceReader:
    """The files of one checkpoint, opened as they are needed; a context manager."""

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
        """Rows `wanted` of a tensor, on the CPU.

        Args:
            sliced: where its slices are.
            key: what they are called in their files.
            wanted: ``[start, stop)``.

        Raises:
            CheckpointError: a slice is not where the index says, or rows are missing.
        """
        start, stop = wanted
        count = max(0, stop - start)
        rows = torch.empty((count, *sliced.shape[1:]), dtype=getattr(torch, sliced.dtype))
        filled = 0
        for process, low, high in sliced.slices:
            first, last = intersect((low, high), wanted)
            if first < last:
                part = self._slice(process, key)[first - low : last - low]
                rows[first - start : last - start] = part
                filled += last - first
        if filled != count:
            raise CheckpointError(
                f"{self._checkpoint}: {key} has {filled} of the {count} rows {start} to {stop}; "
                "its index does not fit its files"
            )
        return rows

    def elements(
        self, entry: StateEntry | Weight, sliced: SlicedTensor, key: str, wanted: Interval, *,
        transposed: bool,
    ) -> Tensor:  # fmt: skip
        """Elements `wanted` of a tensor that is stored as a row of its elements.

        Args:
            entry: what the tensor is.
            sliced: where its slices are.
            key: what they are called in their files.
            wanted: ``[start, stop)``.
            transposed: count the elements column by column.
        """
        if entry.transposed == transposed:
            return self.rows(sliced, key, wanted)
        start, stop = wanted
        if start >= stop:
            return self.rows(sliced, key, (0, 0))
        # count x length as it was stored, length x count as it is wanted
        count, length = entry.shape[::-1] if entry.transposed else entry.shape
        first, last = start // count, -(-stop // count)
        rows = torch.empty((last - first, count), dtype=getattr(torch, sliced.dtype))
        step = max(1, BLOCK_ELEMENTS // length)
        for low in range(0, count, step):
            high = min(low + step, count)
            block = self.rows(sliced, key, (low * length, high * length)).view(-1, length)
            rows[:, low:high] = block[:, first:last].T
        values = rows.view(-1)[start - first * count : stop - first * count]
        return values if values.numel() == rows.numel() else values.clone()

    def random_states(self, process: int) -> dict[str, Tensor]:
        """The states of random number generators that a process wrote."""
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
