"""Memory of a training process: weights, gradients and state by tensor, the total by RSS."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from arg_dist.sharding.shard import local_part
from benchmarks.compare.counting import Bytes, count, tensors_in


def held_state(optimizers: Iterable[Optimizer]) -> Bytes:
    """Bytes of all state tensors on this process, counted as in ``benchmarks.compare``."""
    return count([local_part(each) for o in optimizers for each in tensors_in(o.state)])


class Holdings:
    """Hooks into optimizer steps and counts the weights and gradients present.

    Attributes:
        gradients: bytes of the gradients passed to the optimizers since :meth:`begin`. An engine
            may call an optimizer once per part of the model: this is the sum.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        self._model = model
        self._storages: dict[int, int] = {}
        self.gradients = 0
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(self._look)

    @property
    def weights(self) -> int:
        """Bytes of weights since :meth:`begin`: the model's, and the optimizers' copies if any."""
        return sum(self._storages.values())

    def begin(self) -> None:
        """Reset the counts."""
        self._storages.clear()
        self.gradients = 0

    def _look(self, optimizer: Optimizer, *_: Any) -> None:
        moved = [p for group in optimizer.param_groups for p in group["params"]]
        for tensor in map(local_part, [*_weights_of(self._model), *moved]):
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = storage.nbytes()
        gradients = [p.grad for p in moved if p.grad is not None]
        self.gradients += count([local_part(gradient) for gradient in gradients]).logical


def _weights_of(model: nn.Module) -> Iterator[Tensor]:
    for parameter in model.parameters():
        yield parameter
        if hasattr(parameter, "ds_tensor"):  # ZeRO-3 stores this process's shard there
            yield parameter.ds_tensor


class PeakMemory:
    """Peak memory of this process, or of its GPU, in addition to that at construction.

    On CPUs this is Linux's resident set size, which includes allocator slack and memory held by
    libraries.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        _give_back_free_memory()
        self._before = self._now()

    def begin(self) -> None:
        """Reset the peak, but not the starting point."""
        if self._device.type == "cpu":
            _write_quietly("/proc/self/clear_refs", "5")
        else:
            torch.accelerator.reset_peak_memory_stats()

    @property
    def beyond(self) -> int | None:
        """Peak bytes above the starting point; None where the system does not report them."""
        if self._device.type == "cpu":
            peak = _status("VmHWM")
        else:
            peak = torch.accelerator.max_memory_allocated()
        return None if peak is None or self._before is None else max(0, peak - self._before)

    def _now(self) -> int | None:
        if self._device.type == "cpu":
            return _status("VmRSS")
        return int(torch.accelerator.memory_allocated())


def _status(key: str) -> int | None:
    """Bytes under `key` in ``/proc/self/status``; None if not available."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith(f"{key}:")), None)
    return None if found is None else int(found[1]) * 1024


def _give_back_free_memory() -> None:
    """Return free heap memory to the system; otherwise it would absorb later allocations."""
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _write_quietly(path: str, text: str) -> None:
    """Write unless the system forbids it; the peak then counts from the start of the process."""
    with contextlib.suppress(OSError):
        Path(path).write_text(text)
