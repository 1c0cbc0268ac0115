"""Write the results of a comparison: ``results.json``, ``table.md``, plots."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from arg_dist.checkpoint.files import write_atomically
from arg_dist.cli.parsing import InputError
from benchmarks.compare.pictures import draw_all
from benchmarks.compare.records import Records
from benchmarks.compare.results import measure_of, results_json, rows_of
from benchmarks.compare.tables import markdown, print_rows
from launchers.reporting.files import write_json


def write_outcome(directory: Path, console: Console | None = None) -> None:
    """Write the result files into `directory` from its runs, and print the table.

    Raises:
        InputError: it contains no runs.
    """
    records = Records(directory)
    comparison, runs = records.comparison(), records.runs()
    if comparison is None or not runs:
        raise InputError(f"{directory}: contains no comparison runs")
    rows, measure = rows_of(comparison, runs), measure_of(runs)
    write_json(directory / "results.json", results_json(comparison, runs))
    text = markdown(rows, measure)
    write_atomically(directory / "table.md", lambda temporary: temporary.write_text(text))
    print_rows(rows, measure, console)
    drawn = draw_all(directory, rows, runs, measure)
    names = ["table.md", "results.json", *(path.name for path in drawn)]
    (console or Console()).print(
        f"wrote to {directory}: {', '.join(names)}", highlight=False, soft_wrap=True
    )
