"""How much memory tensors take in one step at its peak, beyond what was there before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

Step = Callable[[], object]

_MARK = "the measured step"


def peak_of_a_step(prepare: Callable[[], Step], *, device: torch.device, warm_up: int = 2) -> int:
    """Bytes of tensors at the peak of a step, less those before it.

    On CPUs the profiler hears of every allocation, by operators and in C++ too, from before the
    tensors are made that a step may replace; of memory that a library takes for itself, as LAPACK
    and MKL do, it does not. On GPUs torch's own allocator counts.

    Args:
        prepare: makes what a step needs, and returns the step.
        device: where it works.
        warm_up: steps before the one that is measured.
    """
    if device.type == "cpu":
        return _on_cpu(prepare, warm_up)
    step = prepare()
    for _ in range(warm_up):
        step()
    torch.accelerator.synchronize()
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    step()
    torch.accelerator.synchronize()
    return int(torch.accelerator.max_memory_allocated() - before)


def _on_cpu(prepare: Callable[[], Step], warm_up: int) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = prepare()
        for _ in range(warm_up):
            step()
        with record_function(_MARK):
            step()
    (mark,) = (event for event in _events(profiler) if event.name() == _MARK)
    began, ended = mark.start_ns(), mark.start_ns() + mark.duration_ns()
    live = before = peak = 0
    for moment, change in allocations(profiler):
        live += change
        if moment < began:
            before = peak = live
        elif moment <= ended:
            peak = max(peak, live)
    return peak - before


def allocations(profiler: profile) -> list[tuple[int, int]]:
    """All that a profiler with ``profile_memory`` has heard of, in the order of time.

    Args:
        profiler: one that has ended.

    Returns:
        Of each allocation its moment, in nanoseconds, and its bytes; fewer than 0 are given back.
    """
    changes = [(e.start_ns(), e.nbytes()) for e in _events(profiler) if e.name() == "[memory]"]
    return sorted(changes, key=lambda change: change[0])  # stable: as they came


def _events(profiler: profile) -> list[Any]:
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    return profiler.profiler.kineto_results.events()  # nowhere else is each allocation
