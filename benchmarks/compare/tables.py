"""The table of a comparison, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from arg_dist.config import in_bytes
from benchmarks.compare.results import Row
from launchers.reporting.measures import Measure

EDGE = "edge"
"""Marks a best learning rate that is the lowest or highest of those tried."""


def columns(rows: Sequence[Row], measure: Measure) -> list[tuple[str, list[str]]]:
    """Title and cells of each column."""
    kept = "matrix state / AdamW's"
    return [
        ("method", [row.method for row in rows]),
        ("learning rates: " + measure.title, [_swept(row) for row in rows]),
        ("best", [_best(row) for row in rows]),
        ("best of the rest", [_best_of_rest(row) for row in rows]),
        ("seeds", [_seeds(row) for row in rows]),
        ("median", [number(row.median) for row in rows]),
        ("spread", [number(row.spread) for row in rows]),
        (kept, [share(row.share("logical")) for row in rows]),
        ("by storage", [share(row.share("storage")) for row in rows]),
        ("all state", [in_bytes(row.state["storage"]) if row.state else "-" for row in rows]),
        ("mean rank", [_ranks(row) for row in rows]),
        ("flap", [share(row.flap) for row in rows]),
        ("s/step", [_seconds(row, "step") for row in rows]),
        ("CPU s/step", [_seconds(row, "step_cpu") for row in rows]),
        ("optimizer s/step", [_seconds(row, "optimizer_mean") for row in rows]),
    ]


def notes(rows: Sequence[Row], measure: Measure) -> list[str]:
    """Notes that explain the table."""
    better = "lower" if measure.lower_is_better else "higher"
    lines = [
        f"Final {measure.title}: {better} is better. {_order(rows)} Median and spread (maximum "
        "minus minimum) are over the seeds.",
        f'"{EDGE}": the best learning rate is the lowest or highest tried.',
        "State: peak bytes of all tensors in optimizer.state. Matrix state: that of the low-rank "
        "matrices, relative to AdamW's two fp32 moments, counting elements, and counting the "
        "storages kept alive. Seconds per step: wall clock, CPU time, and wall clock in the "
        "optimizer (mean; the others are medians).",
    ]
    counts = {row.method: len(row.swept) for row in rows}
    if len(set(counts.values())) > 1:
        sizes = ", ".join(f"{name} {count}" for name, count in counts.items())
        lines.append(f"The sweeps differ in size: {sizes} {_unit(rows)}.")
    lines += [f"{row.method} at {_short(lost)}" for row in rows for lost in row.lost]
    return lines


def _order(rows: Sequence[Row]) -> str:
    """Which learning rates were run."""
    if not any(row.two_rates for row in rows):
        return "All learning rates were run on the first seed, the best one also on the others."
    return (
        "Learning rates are those of the low-rank matrices and of the rest (embeddings, output "
        "head, norms, biases). Those of the matrices were run on the first seed at one rate of the "
        "rest, then those of the rest at the best of them and, if another one was better, its "
        "neighbours again; the best pair also on the other seeds."
    )


def _unit(rows: Sequence[Row]) -> str:
    return f"{'pairs of ' if any(row.two_rates for row in rows) else ''}learning rates"


def markdown(rows: Sequence[Row], measure: Measure) -> str:
    """The table and its notes as Markdown."""
    cells = columns(rows, measure)
    lines = [
        _line([title for title, _ in cells]),
        _line(["---"] + ["---:"] * (len(cells) - 1)),
        *(_line([column[i] for _, column in cells]) for i in range(len(rows))),
    ]
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes(rows, measure)) + "\n"


def print_rows(rows: Sequence[Row], measure: Measure, console: Console | None = None) -> None:
    """Print learning rates, losses, costs and notes, in at most 80 columns."""
    console = console or Console()
    losses = _table("method", "best lr", "rest lr", "median", "spread")
    for row in rows:
        cells = (_best(row), _best_of_rest(row), number(row.median), number(row.spread))
        losses.add_row(row.method, *cells)
    costs = _table("method", "state", "stored", "rank", "flap", "s/step")
    for row in rows:
        costs.add_row(
            row.method,
            share(row.share("logical")),
            share(row.share("storage")),
            "-" if row.mean_rank is None else f"{row.mean_rank:.1f}",
            share(row.flap),
            _seconds(row, "step"),
        )
    for part in (_grid(rows), losses, costs):
        console.print(part)
        console.print()
    for line in notes(rows, measure):
        console.print(line, highlight=False, markup=False)


def _grid(rows: Sequence[Row]) -> Table:
    """What each pair of rates came to: a line per method and rate of the rest."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for tried in row.swept:
            rest = f"{tried.rest_lr:g}" if row.two_rates else ""
            cell = f"{tried.lr:g}: {number(tried.final)}"
            is_best = (tried.lr, tried.rest_lr) == (row.lr, row.rest_lr)
            lines.setdefault((row.method, rest), []).append(f"[bold]{cell}[/]" if is_best else cell)
    table = _table("rates", "rest", *[""] * max(map(len, lines.values()), default=0))
    for titles, cells in lines.items():
        table.add_row(*titles, *cells)
    return table


def _table(first: str, *others: str) -> Table:
    # a single space between columns leaves space for long names
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column(first, style="bold")
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def number(value: float | None) -> str:
    """Four decimals, or a dash."""
    return "-" if value is None else f"{value:.4f}"


def share(value: float | None) -> str:
    """``"12.3 %"``, or a dash."""
    return "-" if value is None else f"{100 * value:.1f} %"


def _short(text: str, most: int = 120) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _swept(row: Row) -> str:
    """All pairs, those of one rate of the rest together."""
    parts = []
    for rest_lr, group in groupby(
        row.swept, lambda tried: tried.rest_lr if row.two_rates else None
    ):
        cells = ", ".join(f"{tried.lr:g}: {number(tried.final)}" for tried in group)
        parts.append(cells if rest_lr is None else f"at rest {rest_lr:g} {cells}")
    return "; ".join(parts)


def _best(row: Row) -> str:
    if row.lr is None:
        return "-"
    return f"{row.lr:g} ({EDGE})" if row.edge else f"{row.lr:g}"


def _best_of_rest(row: Row) -> str:
    if row.rest_lr is None or not row.two_rates:
        return "-"
    return f"{row.rest_lr:g} ({EDGE})" if row.rest_edge else f"{row.rest_lr:g}"


def _seeds(row: Row) -> str:
    return " ".join(number(value) for value in (row.by_seed or {}).values()) or "-"


def _ranks(row: Row) -> str:
    if row.mean_rank is None or row.final_rank is None:
        return "-"
    return f"{row.mean_rank:.1f}, end {row.final_rank:.1f}"


def _seconds(row: Row, key: str) -> str:
    return f"{row.seconds[key]:.3f}" if row.seconds else "-"
