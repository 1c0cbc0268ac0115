"""What a step asks of the device: operators, kernels, copies, and how often it waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from arg_dist.library_internals import DISPATCH_MODE
from benchmarks.gpu.llama import llama, optimizers
from benchmarks.gpu.sections import Sample, Setting
from benchmarks.measuring.results import NOT_MEASURED, Block, Figures
from benchmarks.measuring.shapes import DTYPES, Place, layer_shapes
from benchmarks.measuring.timing import wait_for_device

TITLE = "Operators, kernels and waits of a step"
WARM_UP = 3

STEADY, REFRESH = "steady", "with a refresh of all matrices"
COLUMNS = {
    "operators": "operators",
    "kernels": "kernels",
    "to_device": "copies there",
    "to_host": "and back",
    "waits": "waits",
}
"""Titles by the key of a sample."""
NO_PROFILE = dict.fromkeys(key for key in COLUMNS if key != "operators")


class Operators(DISPATCH_MODE.imported()):  # type: ignore[misc]
    """Counts the operators that reach a device.

    Attributes:
        names: how often each was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count an operator, and call it."""
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def measure(setting: Setting) -> Iterator[Sample]:
    """A sample for each type, kind of step and optimizer."""
    sizes, layers = setting.sizes, setting.sizes.profiled_layers
    matrices = sum(shape.count for shape in layer_shapes(sizes.model, layers))
    for dtype_name, dtype in DTYPES.items():
        place = Place(setting.device, dtype)
        model = llama(sizes.model, layers, sizes.vocabulary, place)
        for kind in (STEADY, REFRESH):
            found = optimizers(model, sizes.rank, refreshing=kind == REFRESH)
            for name, optimizer in found.items():
                for _ in range(WARM_UP):
                    optimizer.step()
                yield {
                    "dtype": dtype_name,
                    "step": kind,
                    "optimizer": name,
                    "matrices": matrices,
                    **counted(optimizer.step, setting.device),
                }


def counted(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """What one call asks for; beside the operators, only a CUDA device tells."""
    with Operators() as operators:
        step()
    every = {"operators": operators.names.total(), "names": dict(operators.names)}
    if device.type != "cuda":
        reason = f"GPU: {NOT_MEASURED}; operators as PyTorch dispatches them on {device.type}"
        return {**every, **NO_PROFILE, "reason": reason}
    wait_for_device()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        wait_for_device()
    events = profiler.events() or ()
    return every | on_cuda([(event.name, event.device_type.name) for event in events])


def on_cuda(events: list[tuple[str, str]]) -> dict[str, Any]:
    """What the events of a profile say, by name and device.

    The host's calls of the CUDA runtime are among the host's events. A copy from the host's
    pageable memory waits without a call that says so; a device-wide wait is the profiler's or ours.
    """
    host = Counter(name for name, where in events if where == "CPU")
    # what names a part of the program stands on both sides, kernels and copies on one
    device = Counter(name for name, where in events if where == "CUDA" and name not in host)
    if not device:
        reason = "The profiler has seen no kernel: CUPTI is missing, or not permitted"
        return {**NO_PROFILE, "reason": reason}
    copies = {name: count for name, count in device.items() if name.startswith("Memcpy")}
    cleared = sum(count for name, count in device.items() if name.startswith("Memset"))
    waiting = {"cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"}
    return {
        "reason": None,
        "kernels": device.total() - sum(copies.values()) - cleared,
        "to_device": sum(count for name, count in copies.items() if "HtoD" in name),
        "to_host": sum(count for name, count in copies.items() if "DtoH" in name),
        "waits": sum(count for name, count in host.items() if name in waiting),
        "copies": copies,
        "memset": cleared,
        "runtime": {k: n for k, n in host.items() if k.startswith(("cuda", "cu")) and n},
    }


def figures(samples: list[Sample]) -> Figures:
    """A block for each type and kind of step, a row for each optimizer."""
    kinds = dict.fromkeys((each["dtype"], each["step"]) for each in samples)
    blocks = []
    for dtype, kind in kinds:
        own = [s for s in samples if (s["dtype"], s["step"]) == (dtype, kind)]
        rows = [[s["optimizer"], *(_cell(s[key]) for key in COLUMNS)] for s in own]
        blocks.append(Block(f"{dtype}, {kind}, {own[0]['matrices']} low-rank matrices", rows))
    reasons = dict.fromkeys(each["reason"] for each in samples if each["reason"])
    notes = ["Waits: synchronizations of a stream or an event.", *(f"{why}." for why in reasons)]
    return Figures(TITLE, ["", *COLUMNS.values()], blocks, notes)


def _cell(count: int | None) -> str:
    return NOT_MEASURED if count is None else str(count)
