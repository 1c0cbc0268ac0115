"""Print a plan as a table, with notes on what its figures include and exclude."""

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
    "engine_buffers": "engine buffers",
    "optimizer_state": "optimizer state",
    "low_rank_moments": "  low-rank moments",
    "projectors": "  bases, projectors",
    "full_rank_state": "  full-rank Adam",
    "step_temporaries": "temporaries",
    "refresh_temporaries": "  with refresh",
    "peak": "peak",
    "engine_sent_per_step": "sent by the engine",
    "engine_sent_between_copies_per_step": "  between copies",
    "sent_per_step": "sent by the optimizer",
    "sent_between_copies_per_step": "  between copies",
    "sent_in_first_step": "  with refresh",
    "sent_between_copies_in_first_step": "    between copies",
}
"""Row titles, by figure name."""


def print_plan(plan: Plan, console: Console) -> None:
    """Print the table and its notes."""
    table = Table(title=title(plan), title_justify="left", box=box.ROUNDED)
    table.add_column("")
    columns = {name: figures.arrays() for name, figures in plan.figures.items()}
    apart = {peer.title for peer in plan.apart}
    for name in columns:
        table.add_column(f"{name} (*)" if name in apart else name, justify="right")
    for key, row in ROWS.items():
        if plan.copies == 1 and "between_copies" in key:
            continue
        cells = [cell(arrays[key]) for arrays in columns.values()]
        bold = "bold" if key in ("optimizer_state", "peak") else None
        table.add_row(row, *cells, style=bold)
    every = plan.figures.values()
    table.add_row("collectives", *(str(each.step_collectives or "-") for each in every))
    table.add_row("  with refresh", *(str(each.refresh_collectives or "-") for each in every))
    console.print(table)
    for note in notes(plan):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def title(plan: Plan) -> str:
    """One line with the model, the engine and the number of processes."""
    processes = "1 process" if plan.processes == 1 else f"{plan.processes} processes"
    where = "" if plan.engine == "none" else f", {ENGINES[plan.engine]}"
    millions = f"{plan.model.elements / 1e6:.1f}M parameters"
    copies = f", {plan.copies} copies" if plan.copies > 1 else ""
    if plan.mesh is not None:
        copies = f" ({plan.mesh.text})"
    return f"{plan.model.name}, {millions}, {plan.dtype}{where}, {processes}{copies}"


def cell(counts: Counts) -> str:
    """The maximum over processes, and the median where it differs."""
    largest, median = int(counts.max()), float(np.median(counts))
    if not largest:
        return "-"
    differ = in_bytes(largest) != in_bytes(median)
    return f"{in_bytes(largest)} (median {in_bytes(median)})" if differ else in_bytes(largest)


def notes(plan: Plan) -> list[str]:
    """Notes on what the figures include and exclude."""
    found = [
        "Figures are per step, for the process with the most. Peak: everything above it at the "
        "optimizer step, with the larger of the temporaries; excludes activations and the engine's "
        "transient memory in forward and backward (gathered layers, buckets).",
        _ranks(plan),
        "With refresh: all matrices refresh in one step, as in the first; later refreshes are "
        "staggered. Engine traffic is estimated for ring collectives, with one micro-batch per "
        "step; optimizer traffic matches the optimizer's own byte counters.",
    ]
    if plan.engine == "zero3":
        found.append(
            "Engine buffers follow DeepSpeed's reduce_bucket_size; pass the value in your JSON "
            "with --reduce-bucket-size."
        )
    if plan.mesh is not None:
        found.append(
            "Activations that tensor parallelism sends in forward and backward are not counted; "
            "parameters are cut as by transformers' tp_plan."
        )
    if plan.dtype != "fp32" and plan.engine in ("none", "ddp", "fsdp2"):
        found.append(
            f"{ENGINES[plan.engine]} updates the {plan.dtype} weights directly; for mixed "
            "precision with fp32 weights, pass --dtype fp32."
        )
    found += [
        f"(*) {peer.title} does not run under {ENGINES[plan.engine]}, where no process has whole "
        "gradients; its figures are for one process without an engine."
        for peer in plan.apart
    ]
    noted = [f"{peer.title}: {peer.note}" for peer in plan.peers if peer.note]
    if any(not peer.shards for peer in plan.peers):
        noted.append(f"GaLore's rank is {plan.settings.max_rank}")
    return [*found, *([f"{'; '.join(noted)}."] if noted else [])]


def _ranks(plan: Plan) -> str:
    """A note on the ranks assumed for the state."""
    if plan.settings.state_budget is None:
        return (
            f"State assumes the largest ranks allowed (max_rank {plan.settings.max_rank}); it is "
            "smaller where the gradient's energy needs fewer directions."
        )
    has_own_budget = plan.copies > 1 and plan.settings.gradient_sync == "engine"
    of_a_copy = " of a copy" if has_own_budget else ""
    return (
        "State assumes the ranks that state_budget allows in the first step; at any ranks, all "
        f"processes{of_a_copy} together keep at most {in_bytes(plan.settings.state_budget)}."
    )
