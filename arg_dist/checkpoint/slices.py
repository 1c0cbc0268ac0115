"""Read any rows of a tensor from the slices that several processes wrote."""

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
from arg_dist.subspace.distributed import Interval, intersect

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
        start, stop = wanted
        count = max(0, stop - start)
        rows = torch.empty(
            (count, *sliced.shape[1:]), dtype=getattr(torch, sliced.dtype), device="cpu"
        )
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
                "its index does not match its files; use another checkpoint"
            )
        return rows

    def elements(
        self, entry: StateEntry | Weight, sliced: SlicedTensor, key: str, wanted: Interval, *,
        transposed: bool,
    ) -> Tensor:  # fmt: skip
        """Reads elements `wanted` of a tensor that is stored flattened, to the CPU.

        Args:
            entry: the tensor's entry in the index.
            sliced: the tensor's slices.
            key: name of the slices in their files.
            wanted: ``[start, stop)``.
            transposed: whether `wanted` counts the elements in column-major order.
        """
        if entry.transposed == transposed:
            return self.rows(sliced, key, wanted)
        start, stop = wanted
        if start >= stop:
            return self.rows(sliced, key, (0, 0))
        # stored as count x length, requested as length x count
        count, length = entry.shape[::-1] if entry.transposed else entry.shape
        first, last = start // count, -(-stop // count)
        rows = torch.empty((last - first, count), dtype=getattr(torch, sliced.dtype), device="cpu")
        step = max(1, BLOCK_ELEMENTS // length)
        for low in range(0, count, step):
            high = min(low + step, count)
            block = self.rows(sliced, key, (low * length, high * length)).view(-1, length)
            rows[:, low:high] = block[:, first:last].T
        values = rows.view(-1)[start - first * count : stop - first * count]
        return values if values.numel() == rows.numel() else values.clone()

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
