"""A plan for the terminal, with what its figures hold and what they do not."""

from __future__ import annotations

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from arg_dist.config import in_bytes
from arg_dist.planning.choices import ENGINES
from arg_dist.planning.figures import Plan
from arg_dist.planning.rows import Counts

ROWS = {
    "weights": "weights",
    "master_weights": "fp32 master weights",
    "gradients": "gradients",
    "engine_buffers": "engine's buffers",
    "optimizer_state": "optimizer state",
    "low_rank_moments": "  low-rank moments",
    "projectors": "  bases, projectors",
    "full_rank_state": "  full-rank Adam",
    "step_temporaries": "temporaries",
    "refresh_temporaries": "  with new bases",
    "peak": "peak",
    "engine_sent_per_step": "sent by the engine",
    "sent_per_step": "sent by the optimizer",
    "sent_in_first_step": "  with new bases",
}
"""The rows of the table, by the figures' names."""


def print_plan(plan: Plan, console: Console) -> None:
    """Prints the table, and what must be known to read it."""
    table = Table(title=title(plan), title_justify="left", box=box.ROUNDED)
    table.add_column("")
    columns = {name: figures.arrays() for name, figures in plan.figures.items()}
    for name in columns:
        apart = name == "GaLore" and not plan.galore_runs
        table.add_column(f"{name} (*)" if apart else name, justify="right")
    for key, row in ROWS.items():
        cells = [cell(arrays[key]) for arrays in columns.values()]
        bold = "bold" if key in ("optimizer_state", "peak") else None
        table.add_row(row, *cells, style=bold)
    every = plan.figures.values()
    table.add_row("collectives", *(str(each.step_collectives or "-") for each in every))
    table.add_row("  with new bases", *(str(each.refresh_collectives or "-") for each in every))
    console.print(table)
    for note in notes(plan):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def title(plan: Plan) -> str:
    """Model, engine and processes in one line."""
    processes = "1 process" if plan.processes == 1 else f"{plan.processes} processes"
    where = "" if plan.engine == "none" else f", {ENGINES[plan.engine]}"
    millions = f"{plan.model.elements / 1e6:.1f}M parameters"
    return f"{plan.model.name}, {millions}, {plan.dtype}{where}, {processes}"


def cell(counts: Counts) -> str:
    """The fullest process's bytes, and the median one's where it has others."""
    largest, median = int(counts.max()), float(np.median(counts))
    if not largest:
        return "-"
    differ = in_bytes(largest) != in_bytes(median)
    return f"{in_bytes(largest)} (median {in_bytes(median)})" if differ else in_bytes(largest)


def notes(plan: Plan) -> list[str]:
    """What the figures hold, and what they do not."""
    found = [
        "One step of the fullest process. Peak: all rows above it at the optimizer's step, and the "
        "larger of the temporaries. It does not hold activations, nor what the engine takes for a "
        "while in the forward and backward passes (gathered layers, buckets).",
        _ranks(plan),
        "New bases: of all matrices in one step, as in the first one; later they are staggered. "
        "The engine's bytes are estimates for rings, with one micro-batch per step; the "
        "optimizer's are those that it counts.",
    ]
    if plan.engine == "zero3":
        found.append(
            "The engine's buffer is DeepSpeed's reduce_bucket_size; give that of your JSON with "
            "--reduce-bucket-size."
        )
    if plan.dtype != "fp32" and plan.engine in ("none", "ddp", "fsdp2"):
        found.append(
            f"{ENGINES[plan.engine]} trains the {plan.dtype} weights themselves; for mixed "
            "precision, where the weights are in fp32, give --dtype fp32."
        )
    rank = plan.settings.max_rank
    galore = f"GaLore at rank {rank}, as galore-torch 1.0 keeps it"
    if not plan.galore_runs:
        galore = (
            f"(*) GaLore does not run under {ENGINES[plan.engine]}, where no process has whole "
            f"gradients; the figures are those of one process without an engine. {galore}"
        )
    return [*found, f"{galore}; its temporaries are at least these."]


def _ranks(plan: Plan) -> str:
    """What the state is counted at."""
    if plan.settings.state_budget is None:
        return (
            "State is counted at the largest ranks that matrices may take (max_rank "
            f"{plan.settings.max_rank}); where the gradient's energy asks for less, less is kept."
        )
    return (
        "State is counted at the ranks that state_budget allows in the first step; whatever the "
        f"ranks, all processes together keep at most {in_bytes(plan.settings.state_budget)}."
    )
