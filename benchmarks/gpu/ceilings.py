"""What the device can do at most: the speed of its memory, and of the products of a step."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from arg_dist.subspace.products import MatmulPrecision, matmul_precision
from benchmarks.gpu.clock import timed_on
from benchmarks.gpu.sections import Sample, Setting
from benchmarks.measuring.results import NOT_MEASURED, Block, Figures, Row, number, with_spread
from benchmarks.measuring.shapes import Shape, layer_shapes
from benchmarks.measuring.timing import Times, in_turns
from benchmarks.measuring.turns import shape_in

TITLE = "Speed of memory and of products"

PRECISIONS: dict[str, tuple[torch.dtype, MatmulPrecision]] = {
    "fp32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bf16": (torch.bfloat16, "highest"),
}

QUERY = ("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.memory,power.limit")
"""Tells what torch does not know of the device."""


def measure(setting: Setting) -> Iterator[Sample]:
    """The device; then the speed of a copy; then, for each shape, that of the products."""
    yield {"what": "device", **device_facts(setting.device)}
    sizes, timed = setting.sizes, timed_on(setting.device)
    copies = in_turns({"copy": copy(sizes.copied, setting.device)}, 2 * sizes.rounds, timed)
    yield {"what": "copy", "bytes": 2 * sizes.copied, "seconds": copies["copy"].as_json()}
    for rank in sizes.ranks:
        for shape in layer_shapes(sizes.model):
            for name, (dtype, precision) in PRECISIONS.items():
                made = products(shape, rank, dtype, setting.device)
                with matmul_precision(precision):
                    times = in_turns({k: run for k, (run, _) in made.items()}, sizes.rounds, timed)
                yield {
                    "what": "products",
                    "shape": [shape.rows, shape.columns],
                    "rank": rank,
                    "precision": name,
                    "operations": {k: count for k, (_, count) in made.items()},
                    "seconds": {k: taken.as_json() for k, taken in times.items()},
                }


def copy(size: int, device: torch.device) -> Callable[[], Tensor]:
    """A copy of `size` bytes of the device's memory."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def products(
    shape: Shape, rank: int, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[Callable[[], Tensor], int]]:
    """The products of a step on one matrix, into preallocated memory, and their operations.

    Args:
        shape: of the matrix, m x n, of which the basis spans the shorter side, n.
        rank: r, of the basis.
        dtype: of all factors and results.
        device: where.
    """
    m, n = max(shape.rows, shape.columns), min(shape.rows, shape.columns)
    stored = torch.randn(shape.rows, shape.columns, device=device).to(dtype)
    G = stored if shape.rows >= shape.columns else stored.T
    Q, N = (torch.randn(length, rank, device=device).to(dtype) for length in (n, m))
    P, update = torch.empty_like(N), torch.empty_like(stored)
    W = update if shape.rows >= shape.columns else update.T
    square = torch.empty(n, n, dtype=dtype, device=device)
    return {
        "G Q": (partial(torch.mm, G, Q, out=P), 2 * m * n * rank),
        "N Q^T": (partial(torch.mm, N, Q.T, out=W), 2 * m * n * rank),
        # the first of each iteration of Newton-Schulz
        "S^T S": (partial(torch.mm, G.T, G, out=square), 2 * m * n * n),
    }


def device_facts(device: torch.device) -> dict[str, Any]:
    """What a figure depends on beside the device's name."""
    if device.type != "cuda":
        return {"name": device.type}
    about = torch.cuda.get_device_properties(device)
    facts = {
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory, MiB": about.total_memory // 2**20,
        "CUDA": torch.version.cuda,
        "Triton": import_module("triton").__version__ if find_spec("triton") else "not installed",
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
    }
    try:
        told = subprocess.run(
            [*QUERY, "--format=csv"], capture_output=True, text=True, timeout=10
        ).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return facts
    if len(told) > 1:
        titles, values = (line.split(",") for line in told[:2])
        facts |= {k.strip(): v.strip() for k, v in zip(titles, values, strict=True)}
    return facts


def figures(samples: list[Sample]) -> Figures:
    """A block for the device and its memory, and one for each shape and rank."""
    columns = ["", "ms", "GB/s", "TFLOP/s"]
    blocks: dict[str, list[Row]] = {}
    for sample in samples:
        if sample["what"] == "device":
            facts = [f"{key}: {value}" for key, value in sample.items() if key != "what"]
            blocks["device"] = [[fact, "", "", ""] for fact in facts]
        elif sample["what"] == "copy":
            times = Times.from_json(sample["seconds"])
            speed = number(sample["bytes"] / times.median / 1e9)
            size = f"copy of {sample['bytes'] // 2**21} MiB"
            blocks["memory"] = [[size, with_spread(times.spread.times(1e3)), speed, ""]]
        else:
            heading = f"{shape_in(sample)}, rank {sample['rank']}"
            blocks.setdefault(heading, []).extend(_products(sample))
    notes = [
        "GB/s counts what a copy reads and what it writes. One matrix at a time, its operands not "
        "in a cache; medians, with quartiles in parentheses."
    ]
    if samples[0].get("name") == "cpu":
        notes.append(f"GPU: {NOT_MEASURED}.")
    return Figures(TITLE, columns, [Block(*each) for each in blocks.items()], notes)


def _products(sample: Sample) -> list[Row]:
    rows: list[Row] = []
    for name, kept in sample["seconds"].items():
        times = Times.from_json(kept)
        speed = number(sample["operations"][name] / times.median / 1e12)
        label = f"{name}, {sample['precision']}"
        rows.append([label, with_spread(times.spread.times(1e3)), "", speed])
    return rows
