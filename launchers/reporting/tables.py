"""Summary tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from arg_dist.config import in_bytes
from launchers.reporting.measures import LOSS, MEASURES, judging

Row = tuple[str, str]


def summary_rows(report: dict[str, Any]) -> list[Row]:
    """The figures of a run, one named value per row."""
    parameters = f"{report['model_parameters'] / 1e6:.1f}M parameters"
    state = f"{in_bytes(max(report['state_bytes'], default=0))}"
    adamw = f"{in_bytes(max(report['adamw_state_bytes'], default=0))}"
    final = report["final_measures"]
    shown = {*final, LOSS, report["measure"]}
    return [
        ("status", f"{report['status']}, {report['steps']} of {report['planned_steps']} steps"),
        ("model", f"{report['model']}, {parameters}"),
        ("optimizer", f"{report['optimizer']}, {report['engine']}, {processes(report)}"),
        *((MEASURES[key].title, loss(final.get(key))) for key in MEASURES if key in shown),
        (f"best {MEASURES[report['measure']].title}", loss(report["best_measure"])),
        ("mean rank", "-" if report["mean_rank"] is None else f"{report['mean_rank']:.1f}"),
        ("optimizer state per process", f"{state} (AdamW: {adamw})"),
        ("largest share of AdamW's state", share(report["largest_share"])),
        *_low_rank_rows(report),
        ("seconds per step", seconds(report["seconds_per_step"])),
        *_checkpoint_rows(report),
        ("sent by the optimizer per step", in_bytes(max(report["sent_bytes_per_step"], default=0))),
        *_collective_rows(report),
    ]


def _collective_rows(report: dict[str, Any]) -> list[Row]:
    count = report.get("collectives_per_step")  # earlier reports have none
    return [("optimizer collectives per step", f"{count:.1f}")] if count else []


def _low_rank_rows(report: dict[str, Any]) -> list[Row]:
    state, adamw = report["low_rank_state_bytes"], report["low_rank_adamw_bytes"]
    if not adamw:
        return []
    text = f"{in_bytes(state)} (AdamW: {in_bytes(adamw)}), {share(state / adamw)}"
    return [("state of low-rank matrices", text)]


def _checkpoint_rows(report: dict[str, Any]) -> list[Row]:
    rows = []
    if steps := resumed_steps(report):
        rows.append(("resumed after step", ", ".join(map(str, steps))))
    if saves := report["saves"]:
        rows.append((f"checkpoints, {len(saves)}", typical_save(saves)))
    return rows


def resumed_steps(report: dict[str, Any]) -> list[int]:
    """The steps of the checkpoints from which the run was resumed."""
    return [part["first_step"] - 1 for part in report["parts"] if part["first_step"] > 1]


def typical_save(saves: Sequence[dict[str, Any]]) -> str:
    """``"stall 0.020 s, write 0.412 s, 12.0 MiB"``: the median of each number of `saves`."""
    stall, write, count = (
        median(save[key] for save in saves) for key in ("stall_seconds", "write_seconds", "bytes")
    )
    return f"stall {seconds(stall)}, write {seconds(write)}, {in_bytes(count)}"


def print_summary(report: dict[str, Any], where: str, console: Console | None = None) -> None:
    """Prints the rows of one run and the path of its report."""
    table = Table(box=box.ROUNDED, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in [*summary_rows(report), ("report", where)]:
        table.add_row(name, value)
    (console or Console()).print(table)


def print_comparison(reports: dict[str, dict[str, Any]], console: Console | None = None) -> None:
    """Prints several runs, one row each; state is the largest of any process."""
    table = Table(box=box.ROUNDED)
    table.add_column("run", style="bold", no_wrap=True)
    table.add_column("optimizer", no_wrap=True)
    measure = judging(list(reports.values()))
    for name in (measure.title, "rank", "state", "s/step"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, report in reports.items():
        rank = report["mean_rank"]
        table.add_row(
            name,
            report["optimizer"],
            loss(report["final_measures"].get(measure.key)),
            "-" if rank is None else f"{rank:.1f}",
            f"{in_bytes(max(report['state_bytes'], default=0))}, {share(report['largest_share'])}",
            seconds(report["seconds_per_step"]),
        )
    (console or Console()).print(table)


def processes(report: dict[str, Any]) -> str:
    """``"2 processes"``."""
    count = report["world_size"]
    return f"{count} process" if count == 1 else f"{count} processes"


def loss(value: float | None) -> str:
    """Four decimals, or a dash where nothing was measured."""
    return "-" if value is None else f"{value:.4f}"


def share(value: float | None) -> str:
    """``"37 %"``."""
    return "-" if value is None else f"{100 * value:.0f} %"


def seconds(value: float | None) -> str:
    """``"0.412 s"``."""
    return "-" if value is None else f"{value:.3f} s"
