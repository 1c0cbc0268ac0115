"""A model trained from the same weights by AdamW and by the optimizer: speed, loss, memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

import arg_dist
from arg_dist.planning.llama import model_config
from benchmarks.gpu.sections import Sample, Setting
from benchmarks.measuring.accounting import PeakMemory, held_state
from benchmarks.measuring.results import NOT_MEASURED, Block, Figures, number
from benchmarks.measuring.timing import wait_for_device
from launchers.pretraining.corpus import read_corpus
from launchers.pretraining.models import build_model, count_parameters
from launchers.pretraining.schedule import WarmupCosine
from launchers.pretraining.tokens import ByteTokenizer, Sequences

TITLE = "Training"
TEXT_BYTES = 8 * 2**20
"""As much text as some hundred steps see."""
SEED = 0
WARM_UP = 1
"""Steps that are not timed: the first has the first bases, and compiles."""
MIB = 2**20

METHODS = ("AdamW", "AdaRankGrad")
RATES = {"AdamW": 2e-3, "AdaRankGrad": 1.6e-2}
"""The middle ones of those that ``benchmarks.compare`` tries by default."""


def optimizer_of(method: str, model: torch.nn.Module) -> Optimizer:
    """The optimizer of a method, with the settings of pre-training."""
    if method == "AdamW":
        return AdamW(
            model.parameters(), lr=RATES[method], betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
    groups = arg_dist.param_groups(model)
    return arg_dist.AdaRankGrad(groups, lr=RATES[method], process_group=None)


def measure(setting: Setting) -> Iterator[Sample]:
    """A sample for each method."""
    sizes = setting.sizes
    tokenizer, (batch, length) = ByteTokenizer(), sizes.batch
    corpus = read_corpus(max_bytes=TEXT_BYTES)
    sequences = Sequences.of(corpus, tokenizer, length=length, seed=SEED)
    config = model_config(sizes.trained, vocab_size=tokenizer.vocab_size, length=length)
    for method in METHODS:
        memory = PeakMemory(setting.device)
        memory.begin()
        model: Any = build_model(sizes.trained, config, seed=SEED, deepspeed_config={})
        model.to(setting.device)
        optimizer = optimizer_of(method, model)
        losses, seconds = train(model, optimizer, sequences, setting)
        yield {
            "method": method,
            "model": sizes.trained,
            "parameters": count_parameters(model),
            "tokens_per_step": batch * length,
            "losses": losses,
            "seconds": seconds,
            "peak": memory.beyond,
            "state": held_state([optimizer]).storage,
        }
        del model, optimizer


def train(
    model: Any, optimizer: Optimizer, sequences: Sequences, setting: Setting
) -> tuple[list[float], list[float]]:
    """Loss and seconds of each step; weights are fp32, the forward pass is in bf16."""
    steps, (batch, _) = setting.sizes.steps, setting.sizes.batch
    scheduler = WarmupCosine(optimizer, steps=steps, warmup=max(1, steps // 5), min_lr_ratio=0.1)
    losses, seconds = [], []
    model.train()
    for step in range(steps):
        ids = sequences.batch(step, range(batch)).to(setting.device)
        wait_for_device()
        began = time.perf_counter()
        with torch.autocast(setting.device.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wait_for_device()
        seconds.append(time.perf_counter() - began)
        losses.append(loss.item())
        scheduler.step()
    return losses, seconds


def figures(samples: list[Sample]) -> Figures:
    """A row for each method."""
    columns = ["", "tokens/s", "ms a step", "first loss", "last loss", "peak, MiB", "state, MiB"]
    first = samples[0]
    millions, steps = number(first["parameters"] / 1e6), len(first["losses"])
    heading = (
        f"{first['model']}, {millions}M parameters: {steps} steps of {first['tokens_per_step']} "
        "tokens"
    )
    notes = [
        "Weights in fp32, forward pass in bf16, bytes of installed Python source. Tokens a second "
        "over all steps but the first, refreshes included; the time of a step is their median. "
        "Last loss: mean of the last fifth of the steps. Peak beyond what is there before the "
        "model."
    ]
    return Figures(TITLE, columns, [Block(heading, [_row(each) for each in samples])], notes)


def _row(sample: Sample) -> list[str]:
    timed, losses = sample["seconds"][WARM_UP:], sample["losses"]
    last = losses[-max(1, len(losses) // 5) :]
    return [
        sample["method"],
        number(sample["tokens_per_step"] * len(timed) / sum(timed)),
        number(1e3 * median(timed)),
        f"{losses[0]:.4f}",
        f"{sum(last) / len(last):.4f}",
        NOT_MEASURED if sample["peak"] is None else number(sample["peak"] / MIB),
        number(sample["state"] / MIB),
    ]
