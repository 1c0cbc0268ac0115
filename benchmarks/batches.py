"""What the optimizer takes of a training step, by the number of tokens in it.

    python -m benchmarks.batches --model nano

In one process on a CPU, without refreshes, in CPU time: of forward and backward for 1024 tokens,
and of a step of each kind, by turns. A step takes as long for any number of tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import arg_dist
from arg_dist.planning.llama import LLAMA_SIZES, model_config
from launchers.pretraining.models import build_model

KINDS: dict[str, dict[str, Any]] = {
    "`residual=none`": {"residual": "none"},
    "`matched`": {"residual": "matched"},
    "`recommended`": {},
    "`polar_precision=bf16`": {"polar_precision": "bf16"},
    "`polar_steps=3`": {"polar_steps": 3},
    "`pretraining`": {"preset": "pretraining"},
}
SEQUENCES, LENGTH, VOCABULARY = 8, 128, 258
MULTIPLES = (1, 4, 16, 64, 128)
"""Tokens of a step, as multiples of 1024."""


def seconds(action: Callable[[], Any]) -> float:
    """CPU time of this process."""
    began = time.process_time()
    action()
    return time.process_time() - began


def measured(model_name: str, rounds: int) -> tuple[float, dict[str, float]]:
    """Median seconds of forward and backward for 1024 tokens, and of a step of each kind."""
    config = model_config(model_name, vocab_size=VOCABULARY, length=LENGTH)
    model: Any = build_model(model_name, config, seed=0, deepspeed_config={})
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), dtype=torch.int64)
    every: dict[str, Any] = {"AdamW": torch.optim.AdamW(model.parameters())}
    for name, kind in KINDS.items():
        given = {"process_group": None, "min_gap": 10_000, "max_gap": 10_000, **kind}
        every[name] = arg_dist.AdaRankGrad(arg_dist.param_groups(model), **given)

    def pass_through() -> None:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()

    pass_through()
    for optimizer in every.values():  # its first bases, and moments
        optimizer.step()
    passing: list[float] = []
    stepping: dict[str, list[float]] = {name: [] for name in every}
    for _ in range(rounds):
        passing.append(seconds(pass_through))
        for name, optimizer in every.items():
            stepping[name].append(seconds(optimizer.step))
    return median(passing), {name: median(times) for name, times in stepping.items()}


def main(words: list[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="nano", choices=sorted(LLAMA_SIZES))
    parser.add_argument("--rounds", type=int, default=9, help="of all kinds by turns (default: 9)")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    passing, stepping = measured(options.model, options.rounds)
    heads = [f"{count} k tokens" for count in MULTIPLES]
    print(f"`{options.model}`: forward and backward {1e3 * passing:.0f} ms per 1024 tokens")
    print(f"| | step, ms | {' | '.join(heads)} |\n|---|---|{'---|' * len(heads)}")
    for name, step in stepping.items():
        shares = [f"{step / (step + count * passing):.1%}" for count in MULTIPLES]
        print(f"| {name} | {1e3 * step:.1f} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
