"""How much memory saving and loading take, counted where torch allocates, and by the kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from matrices import gaussian
from one_process import feed, parameters_of

from arg_dist import AdaRankGrad
from arg_dist.checkpoint import load, save

MATRICES, SIDE, RANK = 10, 768, 96
WEIGHT = 4 * SIDE * SIDE
STATE = 3 * 4 * SIDE * RANK
"""Bytes of one matrix, and of its basis and moments."""
MORE = 1 << 20
"""Bytes for everything else: the states of random number generators, an index, a page here and
there. Less than one matrix's state by far would not be seen, two matrices' would."""


def build(group: Any) -> AdaRankGrad:
    named = [(f"w{i}", torch.nn.Parameter(torch.ones(SIDE, SIDE))) for i in range(MATRICES)]
    return AdaRankGrad(
        named, process_group=group, max_rank=RANK, min_rank=RANK, oversample=4, power_passes=0
    )


def allocated(work: Callable[[], Any], files: Iterable[Path] = ()) -> tuple[int, int]:
    """Bytes of tensors that `work` has at most at one time, and those that it leaves.

    The `files` that it opens are mapped: what is read of them lies in the page cache, which gives
    its pages back when somebody needs memory. They do not count.
    """
    mapped = {path.stat().st_size for path in files}
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        work()
    events = [
        event
        for event in profile.kineto_results.events()
        if event.name() == "[memory]" and abs(event.nbytes()) not in mapped
    ]
    totals = [*accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))]
    return max(totals, default=0), totals[-1] if totals else 0


def resident(work: Callable[[], Any]) -> int:
    """By how many bytes this process has grown at most, in pages of files or its own."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, and not used again
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[key].split()[0])


def write(group: Any, folder: Path) -> tuple[int, int, int, int]:
    """Bytes of this process's file; copies of tensors at most, and left; growth of the process."""
    optimizer = build(group)
    feed(optimizer, *(gaussian(SIDE, SIDE, seed=i) for i in range(MATRICES)))
    for parameter in parameters_of(optimizer):
        parameter.grad = None
    most, left = allocated(lambda: save(folder / "one", optimizer))
    grown = resident(lambda: save(folder / "two", optimizer))
    me = optimizer.bind()[0].communicator.me
    [file] = (folder / "one").glob(f"process-{me:05d}-*")
    return file.stat().st_size, most, left, grown


def read(group: Any, checkpoint: Path) -> tuple[int, int, int]:
    """Copies of tensors at most, and left; the state's bytes."""
    optimizer = build(group)
    optimizer.bind()
    most, left = allocated(lambda: load(checkpoint, optimizer), checkpoint.iterdir())
    return most, left, optimizer.state_bytes()


def test_a_process_needs_memory_for_its_share_and_one_matrix(pool, tmp_path):
    written = pool.run(write, 4, tmp_path, seconds=90)
    total = MATRICES * (WEIGHT + STATE)
    assert total < sum(size for size, *_ in written) < total + 4 * MORE
    for size, most, left, grown in written:
        assert size < total / 4 + 2 * (WEIGHT + STATE)  # matrices are dealt out whole
        assert size - MORE < most < size + MORE and left < MORE
        assert grown < size + 4 * MORE  # libraries that are used for the first time
    for processes in (1, 2):
        for most, left, state in pool.run(read, processes, tmp_path / "one", seconds=60):
            assert state - MORE < left < state + MORE
            assert left + WEIGHT / 2 < most < left + WEIGHT + STATE + MORE, "of one matrix"
        assert processes == 2 or state >= MATRICES * STATE
