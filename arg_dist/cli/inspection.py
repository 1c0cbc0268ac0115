"""List the contents of checkpoints and verify their integrity."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import TextIO

from arg_dist.checkpoint.index import CheckpointError, Index, read_index
from arg_dist.checkpoint.offline import checkpoints_at, verified_alone

TITLES = (
    "checkpoint", "step", "processes", "MiB", "state", "model", "parameters", "matrices",
    "mean rank",
)  # fmt: skip


def inspect(path: Path, output: TextIO) -> bool:
    """Verify checkpoints and print a table of them, newest last.

    Args:
        path: a checkpoint directory, or a directory of checkpoints.
        output: receives the table, then one line for each broken checkpoint with the reason.

    Returns:
        Whether all of them are intact.

    Raises:
        CheckpointError: no checkpoint was found, or the index of the only one cannot be read.
    """
    faults: list[str] = []
    rows: list[tuple[str, ...]] = [TITLES]
    found = checkpoints_at(path)
    for checkpoint in found:
        index, fault = _verify(checkpoint)
        if index is None and found == [path]:
            raise CheckpointError(fault)
        if not checkpoint.exists():
            continue  # removed meanwhile by the run that writes here, which keeps only the last few
        faults += [] if fault is None else [fault]
        rows.append(_row(checkpoint, index, "intact" if fault is None else "broken"))
    output.writelines(f"{line}\n" for line in _aligned(rows))
    output.writelines(f"broken: {fault}\n" for fault in faults)
    return not faults


def _verify(checkpoint: Path) -> tuple[Index | None, str | None]:
    """The index, or None if it cannot be read; and the fault, or None if there is none."""
    index = None
    try:
        index = read_index(checkpoint)
        verified_alone(checkpoint)
    except CheckpointError as error:
        return index, str(error)
    return index, None


def _row(checkpoint: Path, index: Index | None, condition: str) -> tuple[str, ...]:
    name = checkpoint.resolve().name
    if index is None:
        return (name, "-", "-", "-", condition, "-", "-", "-", "-")
    size = sum(file.stat().st_size for file in checkpoint.iterdir() if file.is_file())
    [architecture] = (index.model_config_values or {}).get("architectures") or ["-"]
    parameters = sum(
        math.prod(weight.shape) for weight in index.weights.values() if weight.kind != "buffer"
    )
    matrices = [entry for entry in index.states.values() if entry.kind == "matrix"]
    ranks = [entry.rank for entry in matrices]
    return (
        name,
        str(index.step),
        str(index.world_size),
        f"{size / 2**20:.1f}",
        condition,
        architecture,
        str(parameters) if index.weights else "-",  # saved without weights
        str(len(matrices)),
        f"{mean(ranks):.1f}" if ranks else "-",
    )


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Lines of a table: text left-aligned, numbers right-aligned."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = {TITLES.index(title) for title in ("checkpoint", "state", "model")}
    return [
        "  ".join(
            cell.ljust(width) if i in texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
