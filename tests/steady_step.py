"""Which functions of the package a steady step calls: ``python -m tests.steady_step``.

In one process; it is read by following it from file to file, so a test bounds their number.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import arg_dist

PACKAGE = Path(arg_dist.__file__).parent


def calls_of_a_steady_step(matrices: int = 3) -> dict[str, Counter[str]]:
    """Calls by function, by file of the package, of a step without refreshes.

    Args:
        matrices: number of matrices; a vector is trained beside them.
    """
    torch.manual_seed(0)
    shapes = [(16, 12)] * matrices + [(5,)]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    named = [(f"layer{i}.weight", parameter) for i, parameter in enumerate(parameters)]
    optimizer = arg_dist.AdaRankGrad([{"params": named, "low_rank": True}], max_rank=4)
    found: dict[str, Counter[str]] = defaultdict(Counter)

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            found[path.relative_to(PACKAGE).as_posix()][frame.f_code.co_qualname] += 1

    for step in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        before = sys.getprofile()
        sys.setprofile(note if step == 2 else before)
        try:
            optimizer.step()
        finally:
            sys.setprofile(before)
    return found


def main() -> None:
    """Print the files, each with its functions."""
    found = calls_of_a_steady_step()
    for file, functions in sorted(found.items()):
        print(f"{file}: {', '.join(f'{name} {count}' for name, count in functions.items())}")
    calls = sum(sum(functions.values()) for functions in found.values())
    print(f"{len(found)} files, {sum(map(len, found.values()))} functions, {calls} calls")


if __name__ == "__main__":
    main()
