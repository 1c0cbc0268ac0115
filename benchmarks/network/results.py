"""The results of the network benchmark: rows, a table, a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from arg_dist.checkpoint.files import write_atomically
from arg_dist.config import in_bytes
from benchmarks.network.bandwidth import name_of
from benchmarks.network.methods import METHODS
from launchers.reporting.charts import STYLE, new_figure
from launchers.reporting.tables import seconds, share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[dict[str, Any]]

JSON, PICTURE, TABLE = "network.json", "network.png", "network.md"
NAMES = {name: method.title for name, method in METHODS.items()}
HEADINGS = (
    "link",
    "optimizer",
    "s/step",
    "fastest - slowest run",
    "waiting",
    "sent, received",
    "sent by optimizer",
)
WIDTH = 120
"""Width of the printed table; in 80 columns every cell would wrap."""
_OURS, _RIVALS = "#1f5fa8", "#c9c9c9"
_WAITING = "#d1495b"


def combine(runs: Rows) -> list[dict[str, Any]]:
    """One row per bandwidth and optimizer, in the order of the runs: medians over its runs.

    Args:
        runs: results of :func:`benchmarks.network.trial.run_trial`, with ``optimizer`` and
            ``bits_per_second`` added.
    """
    rows = []
    places = dict.fromkeys((run["bits_per_second"], run["optimizer"]) for run in runs)
    for bandwidth, optimizer in places:
        mine = [
            run
            for run in runs
            if (run["bits_per_second"], run["optimizer"]) == (bandwidth, optimizer)
        ]
        counted = [run["optimizer_bytes"] for run in mine if run["optimizer_bytes"] is not None]
        row = {key: median(run[key] for run in mine) for key in _MEASURED}
        rows.append(
            {
                "bits_per_second": bandwidth,
                "optimizer": optimizer,
                **row,
                "fastest": min(run["seconds"] for run in mine),
                "slowest": max(run["seconds"] for run in mine),
                "optimizer_bytes": median(counted) if counted else None,
                "runs": len(mine),
            }
        )
    return rows


_MEASURED = ("seconds", "waiting", "sent", "received")


def cells(row: dict[str, Any]) -> list[str]:
    """A row of :func:`combine` as text, under :data:`HEADINGS`."""
    own = row["optimizer_bytes"]
    return [
        name_of(row["bits_per_second"]),
        NAMES.get(row["optimizer"], row["optimizer"]),
        seconds(row["seconds"]),
        f"{row['fastest']:.3f} - {row['slowest']:.3f}",
        share(row["waiting"]),
        f"{in_bytes(row['sent'])}, {in_bytes(row['received'])}",
        "-" if own is None else in_bytes(own),
    ]


def print_table(rows: Rows, console: Console | None = None) -> None:
    """Print `rows`; bytes are per host and step."""
    table = Table(*HEADINGS, box=box.ROUNDED)
    for row in rows:
        table.add_row(*cells(row))
    (console or Console(width=WIDTH)).print(table)


def markdown(rows: Rows) -> str:
    """`rows` as a Markdown table."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *map(cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(rows: Rows, path: Path) -> None:
    """Draw time and bytes per step as a PNG at `path`."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = new_figure(11, 4.5)
        time, traffic = figure.subplots(1, 2)
        _draw_time(time, rows)
        _draw_traffic(traffic, rows)
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def _color(optimizer: str) -> str:
    return _OURS if NAMES.get(optimizer, optimizer).startswith("AdaRankGrad") else _RIVALS


def _draw_time(axes: Axes, rows: Rows) -> None:
    for place, row in enumerate(rows):
        waiting = row["seconds"] * row["waiting"]
        working = row["seconds"] - waiting
        axes.barh(place, working, color=_color(row["optimizer"]))
        axes.barh(place, waiting, left=working, color=_WAITING, alpha=0.55)
        axes.text(row["seconds"], place, f" {row['seconds']:.2f} s", va="center")
    axes.barh(0, 0, color=_WAITING, alpha=0.55, label="waiting for collectives")
    _label(axes, rows)
    axes.legend(loc="lower right")
    axes.set(title="Time per step", xlabel="seconds")
    axes.margins(x=0.15)


def _draw_traffic(axes: Axes, rows: Rows) -> None:
    for place, row in enumerate(rows):
        both = (row["sent"] + row["received"]) / 2**20
        axes.barh(place, both, color=_color(row["optimizer"]))
        axes.text(both, place, f" {both:.2f}", va="center")
    _label(axes, rows)
    axes.set(title="Traffic per host and step", xlabel="MiB, both directions")
    axes.margins(x=0.15)


def _label(axes: Axes, rows: Rows) -> None:
    names = [
        f"{NAMES.get(r['optimizer'], r['optimizer'])}, {name_of(r['bits_per_second'])}"
        for r in rows
    ]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
