"""What a step costs beside the mathematics: microseconds for each of many tiny matrices.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --against PATH    # another checkout, by turns, in one run

In one process on a CPU, without refreshes; Python and the calls of torch dominate.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

import arg_dist

HERE = Path(__file__).resolve().parents[1]
RULES = ("matched", "orthogonalized")
SHAPE, RANK = (16, 12), 4
WARM_UP, STEPS = 3, 12


def microseconds(residual: str, matrices: int) -> float:
    """Median time of a step without a refresh, for each matrix."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(SHAPE)) for _ in range(matrices)]
    gradients = [torch.randn(SHAPE) for _ in parameters]
    group = {
        "params": [(f"layer{i}.weight", parameter) for i, parameter in enumerate(parameters)],
        "low_rank": True,
    }
    rank = {"max_rank": RANK, "min_rank": RANK}
    optimizer = arg_dist.AdaRankGrad([group], process_group=None, residual=residual, **rank)  # type: ignore[arg-type]
    times = []
    for _ in range(WARM_UP + STEPS):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        began = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - began)
    return 1e6 * median(times[WARM_UP:]) / matrices


def measured(checkout: Path, matrices: int) -> dict[str, float]:
    """:func:`microseconds` of each rule, in a fresh process, with the package of a checkout."""
    words = [sys.executable, "-W", "ignore", __file__, "--matrices", str(matrices), "--json"]
    found: dict[str, float] = json.loads(
        subprocess.run(
            words,
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    return found


def main(words: list[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--matrices", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--rounds", type=int, default=5, help="fresh processes (default: 5)")
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.json:
        print(json.dumps({rule: microseconds(rule, options.matrices) for rule in RULES}))
        return
    checkouts = {"this checkout": HERE}
    if options.against is not None:
        if not (options.against / "arg_dist").is_dir():
            parser.error(f"--against {options.against}: no checkout: it has no folder arg_dist")
        checkouts[str(options.against)] = options.against.resolve()
    rounds = [
        {name: measured(path, options.matrices) for name, path in checkouts.items()}
        for _ in range(options.rounds)
    ]
    print(f"Microseconds per matrix and step, medians of {options.rounds} processes")
    print("| | " + " | ".join(RULES) + " |\n|---|" + "---|" * len(RULES))
    for name in checkouts:
        cells = [f"{median(each[name][rule] for each in rounds):.0f}" for rule in RULES]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
