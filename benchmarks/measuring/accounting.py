"""What a process of a training job holds: weights, gradients and state by tensor, all by RSS."""

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

from arg_dist.sharding.local import local_part
from benchmarks.compare.counting import Bytes, count, tensors_in


def held_state(optimizers: Iterable[Optimizer]) -> Bytes:
    """Bytes of all tensors that the optimizers keep on this process, by the rule of `compare`."""
    return count([local_part(each) for o in optimizers for each in tensors_in(o.state)])


class Holdings:
    """Listens to the steps of optimizers, and counts what they find.

    Attributes:
        gradients: bytes of the gradients that the optimizers were handed since :meth:`begin`. An
            engine may call an optimizer once for each part of the model: this is the sum.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        self._model = model
        self._storages: dict[int, int] = {}
        self.gradients = 0
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(self._look)

    @property
    def weights(self) -> int:
        """Bytes of memory that held weights since :meth:`begin`: those the model computes with,
        and those that the optimizers move, where the engine has copies for them.
        """
        return sum(self._storages.values())

    def begin(self) -> None:
        """Counts from here on."""
        self._storages.clear()
        self.gradients = 0

    def _look(self, optimizer: Optimizer, *_: Any) -> None:
        moved = [p for group in optimizer.param_groups for p in group["params"]]
        for tensor in map(local_part, [*_weights_of(self._model), *moved]):
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = storage.nbytes()
        handed = [p.grad for p in moved if p.grad is not None]
        self.gradients += count([local_part(gradient) for gradient in handed]).logical


def _weights_of(model: nn.Module) -> Iterator[Tensor]:
    for parameter in model.parameters():
        yield parameter
        if hasattr(parameter, "ds_tensor"):  # ZeRO-3 leaves its part of a parameter there
            yield parameter.ds_tensor


class PeakMemory:
    """The most memory that this process has, or a GPU for it, beyond what it has at the start.

    On CPUs that is resident memory, as Linux counts it: the allocator's slack and what libraries
    keep for themselves are in it, too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        _give_back_free_memory()
        self._before = self._now()

    def begin(self) -> None:
        """Forgets the peak so far, not the start."""
        if self._device.type == "cpu":
            _write_quietly("/proc/self/clear_refs", "5")
        else:
            torch.accelerator.reset_peak_memory_stats()

    @property
    def beyond(self) -> int | None:
        """Bytes; None where the system does not tell."""
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
    """Bytes under `key` in Linux's account of this process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith(f"{key}:")), None)
    return None if found is None else int(found[1]) * 1024


def _give_back_free_memory() -> None:
    """Asks the C library for it, or what it kept from imports would be taken before new memory."""
    with contextlib.suppress(OSError, AttributeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)


def _write_quietly(path: str, text: str) -> None:
    """Writes, unless the system forbids it: then the peak is that since the process began."""
    with contextlib.suppress(OSError):
        Path(path).write_text(text)
