"""Where figures go: JSON with all rounds, and tables for the terminal and for Markdown."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from arg_dist.cli.parsing import InputError
from benchmarks.measuring.timing import Spread
from launchers.reporting.files import write_json
from launchers.reporting.summary import hardware, versions

NOT_MEASURED = "not measured"
NOT_POSSIBLE = "not possible"
"""Of an optimizer, with a note that says why: see :mod:`benchmarks.measuring.refusals`."""

WIDTH = 100
"""Of tables that go into a file: columns."""

Row = Sequence[str]


class Block(NamedTuple):
    """Rows that belong together, under a heading; each begins with its name."""

    heading: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Figures:
    """One table, and what is behind it.

    Attributes:
        title: what was measured.
        columns: titles of the table's columns; the first is that of the names.
        blocks: the rows.
        notes: what a reader of the table must know.
        samples: every number behind it, as JSON.
    """

    title: str
    columns: Sequence[str]
    blocks: Sequence[Block]
    notes: Sequence[str] = ()
    samples: list[dict[str, Any]] = field(default_factory=list)

    def markdown(self) -> str:
        """The table as Markdown, under its title."""
        numbers = len(self.columns) - 1
        lines: list[Row] = [self.columns, ["---", *["---:"] * numbers]]
        for block in self.blocks:
            lines += [[f"**{block.heading}**", *[""] * numbers], *block.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return "\n\n".join([f"**{self.title}**", table, *self.notes])

    def show(self, console: Console) -> None:
        """Prints the table; where it is narrow, headings and names are wrapped, never numbers."""
        table = Table(title=self.title, title_justify="left", title_style="bold")
        for i, name in enumerate(self.columns):
            table.add_column(name, justify="right" if i else "left", no_wrap=i > 0)
        for block in self.blocks:
            table.add_row(f"[bold]{escape(block.heading)}")
            for name, *cells in block.rows:
                table.add_row(f"  {name}", *cells)
            table.add_section()
        console.print(table)
        for note in self.notes:
            console.print(note, markup=False, highlight=False)


def show(tables: Sequence[Figures]) -> None:
    """Prints the tables, and what they were measured on."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for table in tables:
        table.show(console)
    console.print(measured_on(), markup=False, highlight=False)


def write(tables: Sequence[Figures], path: Path) -> None:
    """Writes `path`, JSON, and the same name with ``.md``."""
    whole = {
        "command": command(),
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "tables": [
            {"title": table.title, "notes": table.notes, "samples": table.samples}
            for table in tables
        ],
    }
    write_json(path, whole)
    text = "\n\n".join([*(table.markdown() for table in tables), measured_on()])
    path.with_suffix(".md").write_text(text + "\n")


def check_out(path: Path) -> None:
    """Makes sure, before anything is measured, that :func:`write` can leave its files.

    Raises:
        InputError: it cannot.
    """
    if path.suffix != ".json":
        raise InputError(f"--out {path}: a name that ends in .json is needed")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"--out {path}: {error.strerror}") from None
    for each in (path, path.with_suffix(".md")):
        if each.is_dir():
            raise InputError(f"--out {path}: {each} is a directory; give another name")


def command() -> str:
    """The command line, as it can be given again."""
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def measured_on() -> str:
    """Command, hardware, versions and date, in one line."""
    machine, found = hardware(), versions()
    place = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cpu_cores']} cores"
    return (
        f"`{command()}`: {place}, {torch.get_num_threads()} threads; torch {found['torch']}; "
        f"{date.today().isoformat()}"
    )


def without_gpu(device: str) -> list[str]:
    """A note that nothing is known of GPUs, if the type of the device is not that of one."""
    return [f"GPU: {NOT_MEASURED}."] if device == "cpu" else []


def number(value: float) -> str:
    """Three digits, and all of those before the point."""
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}"


def with_spread(spread: Spread) -> str:
    """The median, and behind it the quartiles."""
    return f"{number(spread.median)} ({number(spread.low)}..{number(spread.high)})"
