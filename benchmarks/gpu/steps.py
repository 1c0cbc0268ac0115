"""An optimizer step on all parameters of a model against fused AdamW: time, state and peak."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.optim import Optimizer

from benchmarks.gpu.llama import ADAMW, RULES, llama, optimizers
from benchmarks.gpu.sections import Sample, Setting
from benchmarks.measuring.accounting import held_state
from benchmarks.measuring.allocations import peak_of_a_step
from benchmarks.measuring.results import NOT_MEASURED, Block, Figures, Row, number, with_spread
from benchmarks.measuring.shapes import DTYPES, Place
from benchmarks.measuring.timing import Times, turns

TITLE = "A step of a whole model"
REFRESH = ", refresh"
"""Ends the name of an optimizer in the samples, where each of its steps has a refresh."""
MIB = 2**20


def measure(setting: Setting) -> Iterator[Sample]:
    """For each type the rounds, then the memory; all optimizers have the same weights."""
    sizes = setting.sizes
    for dtype_name in reversed(DTYPES):
        place = Place(setting.device, DTYPES[dtype_name])
        model = llama(sizes.model, sizes.layers, sizes.vocabulary, place)
        every = optimizers(model, sizes.rank, refreshing=False)
        refreshing = optimizers(model, sizes.rank, refreshing=True)
        every |= {name + REFRESH: optimizer for name, optimizer in refreshing.items()}
        about: Sample = {
            "dtype": dtype_name,
            "model": sizes.model,
            "rank": sizes.rank,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        steps = {name: optimizer.step for name, optimizer in every.items()}
        for seconds in turns(steps, sizes.rounds):
            yield about | {"seconds": seconds}
        for name, optimizer in every.items():
            yield about | {"optimizer": name, **_memory(optimizer, setting.device)}
        del model, every, refreshing, steps, optimizer


def _memory(optimizer: Optimizer, device: torch.device) -> Sample:
    """Bytes of an optimizer's state, and of the peak of a step beyond what is there before it."""
    peak = peak_of_a_step(partial(getattr, optimizer, "step"), device=device, warm_up=0)
    return {"state": held_state([optimizer]).storage, "temporary": peak}


def figures(samples: list[Sample]) -> Figures:
    """A block for each type, a row for each optimizer."""
    columns = ["", "steady, ms", "of AdamW", "refresh, ms", "state", "temporary", "refreshing"]
    blocks = []
    for dtype in dict.fromkeys(each["dtype"] for each in samples):
        own = [each for each in samples if each["dtype"] == dtype]
        first, millions = own[0], number(own[0]["parameters"] / 1e6)
        heading = f"{first['model']}: {millions}M parameters in {dtype}, rank {first['rank']}"
        blocks.append(Block(heading, [_row(name, own) for name in (ADAMW, *RULES)]))
    notes = [
        "Weights and gradients have the type above the rows, and so has AdamW's state; no forward "
        "pass. Steps are interleaved; medians, with quartiles in parentheses. Memory in MiB; "
        "temporary: peak of a step beyond what is there before it; refreshing: the same of a step "
        "with a refresh of all matrices."
    ]
    return Figures(TITLE, columns, blocks, notes)


def _row(name: str, samples: list[Sample]) -> Row:
    rounds = [each["seconds"] for each in samples if "seconds" in each]
    memory = {each["optimizer"]: each for each in samples if "optimizer" in each}

    def times(of: str) -> Times:
        return Times(tuple(each[of] for each in rounds))

    def mebibytes(of: str, key: str) -> str:
        return number(memory[of][key] / MIB) if of in memory else NOT_MEASURED

    is_adamw = name == ADAMW
    return [
        name,
        with_spread(times(name).spread.times(1e3)),
        number(times(name).over(times(ADAMW)).median),
        "" if is_adamw else number(1e3 * times(name + REFRESH).median),
        mebibytes(name, "state"),
        mebibytes(name, "temporary"),
        "" if is_adamw else mebibytes(name + REFRESH, "temporary"),
    ]
