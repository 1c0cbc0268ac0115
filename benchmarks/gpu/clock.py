"""Times of what the device does, without what the host takes to ask for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from benchmarks.measuring.timing import Timed, seconds_of, wait_for_device

COLD_BYTES = 2**28
"""Larger than any cache: a call finds nothing there of the one before."""
LONGEST = 0.05
"""Seconds for which the device is kept busy at most."""


def timed_on(device: torch.device) -> Timed:
    """Times one call: by the device's own clock on CUDA, else as :func:`seconds_of`."""
    return DeviceTime(device) if device.type == "cuda" else seconds_of


class DeviceTime:
    """Times a call by events, between which the device has nothing to wait for.

    The device first overwrites its cache, again and again, for as long as the host takes to issue
    the call. A function that itself waits for the device is to be timed by :func:`seconds_of`.
    """

    def __init__(self, device: torch.device) -> None:
        self._cold = torch.empty(COLD_BYTES, dtype=torch.uint8, device=device)
        self._clear(3)
        self._clearing = _between(lambda: self._clear(9), lambda: None) / 9

    def __call__(self, function: Callable[[], object]) -> float:
        """Seconds of one call; the function is called twice."""
        wait_for_device()
        began = time.perf_counter()
        function()
        issuing = min(LONGEST, time.perf_counter() - began)
        wait_for_device()
        clears = 1 + math.ceil(1.5 * issuing / self._clearing)
        return _between(function, lambda: self._clear(clears))

    def _clear(self, times: int) -> None:
        for _ in range(times):
            self._cold.zero_()


def _between(function: Callable[[], object], before: Callable[[], None]) -> float:
    """Seconds of the device between two events around `function`, which follow `before`."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before()
    began.record()
    function()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3
