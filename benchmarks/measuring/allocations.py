"""Peak tensor memory of one step, in addition to the memory allocated before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

Step = Callable[[], object]

_MARK = "the measured step"


def peak_of_a_step(prepare: Callable[[], Step], *, device: torch.device, warm_up: int = 2) -> int:
    """Bytes of tensors at the peak of a step, minus those before it.

    On CPUs the profiler records every tensor allocation, including those made in C++, starting
    before the tensors that a step may replace are created. It does not see workspace that libraries
    such as LAPACK and MKL allocate. On GPUs the count is that of torch's allocator.

    Args:
        prepare: sets up and returns the step.
        device: device the step runs on.
        warm_up: number of steps before the measured one.
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
    """All allocations recorded by a profiler with ``profile_memory``, in order of time.

    Args:
        profiler: a stopped profiler.

    Returns:
        For each allocation its time in nanoseconds and its bytes; negative if memory is freed.
    """
    changes = [(e.start_ns(), e.nbytes()) for e in _events(profiler) if e.name() == "[memory]"]
    return sorted(changes, key=lambda change: change[0])  # stable: keeps the recorded order


def _events(profiler: profile) -> list[Any]:
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    return profiler.profiler.kineto_results.events()  # the public API aggregates allocations
