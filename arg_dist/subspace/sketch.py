"""Gaussian sketch matrices that depend on the matrix sketched, never on the process."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

BLOCK = 256
"""Rows drawn from one seed: a process draws only the blocks that contain its rows."""


CPU = torch.device("cpu")


def gaussian_rows(
    rows: tuple[int, int],
    columns: int,
    *,
    seed: int,
    name: str,
    refresh: int,
    device: torch.device = CPU,
) -> Tensor:
    """Rows ``[low, high)`` of the sketch matrix Omega ~ N(0, 1) of one refresh of one matrix.

    The generator is counter-based: its seed is a hash of (seed, name, refresh, block of rows,
    columns). The matrix is therefore equal for every world size and engine, and no process draws
    blocks that it does not need (SSRF, arXiv 2410.17881, algorithm 1; the variance of Omega is
    irrelevant, as the sketch is orthonormalized).

    Args:
        rows: half-open interval of rows.
        columns: width of the sketch.
        seed: the user's seed.
        name: the matrix's name.
        refresh: number of previous refreshes of this matrix.
        device: device of the result; they are drawn on the CPU, and not at all for `meta`.

    Returns:
        ``(high - low) x columns``, fp32.
    """
    low, high = rows
    if low >= high or device.type == "meta":
        return torch.empty(max(0, high - low), columns, dtype=torch.float32, device=device)
    blocks = []
    for block in range(low // BLOCK, (high - 1) // BLOCK + 1):
        text = f"{seed}|{name}|{refresh}|{block}|{columns}".encode()
        number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
        generator = torch.Generator(device=CPU).manual_seed(number)
        blocks.append(
            torch.randn(BLOCK, columns, generator=generator, dtype=torch.float32, device=CPU)
        )
    start = low // BLOCK * BLOCK
    return torch.cat(blocks)[low - start : high - start].to(device)
