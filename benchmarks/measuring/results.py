"""Output of figures: JSON with all rounds, and tables for the terminal and Markdown."""

from __future__ import annotations

import shlex
import subprocess
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
"""Cell of an optimizer that cannot run; :mod:`benchmarks.measuring.refusals` adds the reason."""

CHECKOUT = Path(__file__).resolve().parents[2]

WIDTH = 100
"""Minimum width of tables when the output is not a terminal, in columns."""

Row = Sequence[str]


class Block(NamedTuple):
    """A group of rows under a heading; the first cell of each row is its name."""

    heading: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Figures:
    """One table with its notes and underlying samples.

    Attributes:
        title: what was measured.
        columns: column titles; the first column holds the names.
        blocks: the rows.
        notes: notes that explain the table.
        samples: all underlying numbers, as JSON.
        about: what else the JSON says of the table.
    """

    title: str
    columns: Sequence[str]
    blocks: Sequence[Block]
    notes: Sequence[str] = ()
    samples: list[dict[str, Any]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """The title, table and notes as Markdown; without rows, there is no table."""
        if not self.blocks:
            return "\n\n".join([f"**{self.title}**", *self.notes])
        numbers = len(self.columns) - 1
        lines: list[Row] = [self.columns, ["---", *["---:"] * numbers]]
        for block in self.blocks:
            lines += [[f"**{block.heading}**", *[""] * numbers], *block.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return "\n\n".join([f"**{self.title}**", table, *self.notes])

    def show(self, console: Console) -> None:
        """Print the table; on narrow terminals, headings and names wrap, but never numbers."""
        table = Table(title=self.title, title_justify="left", title_style="bold")
        for i, name in enumerate(self.columns):
            table.add_column(name, justify="right" if i else "left", no_wrap=i > 0)
        for block in self.blocks:
            table.add_row(f"[bold]{escape(block.heading)}")
            for name, *cells in block.rows:
                table.add_row(f"  {name}", *cells)
            table.add_section()
        console.print(table if self.blocks else f"[bold]{escape(self.title)}")
        for note in self.notes:
            console.print(note, markup=False, highlight=False)


def show(tables: Sequence[Figures]) -> None:
    """Print the tables and the line of :func:`measured_on`."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for table in tables:
        table.show(console)
    console.print(measured_on(), markup=False, highlight=False)


def write(tables: Sequence[Figures], path: Path) -> None:
    """Write all figures to `path` as JSON, and the tables to the same name with ``.md``."""
    whole = {
        "command": command(),
        "commit": commit(),
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "tables": [
            {"title": table.title, **table.about, "notes": table.notes, "samples": table.samples}
            for table in tables
        ],
    }
    write_json(path, whole)
    text = "\n\n".join([*(table.markdown() for table in tables), measured_on()])
    path.with_suffix(".md").write_text(text + "\n")


def check_out(path: Path) -> None:
    """Check, before anything is measured, that :func:`write` can create its files.

    Raises:
        InputError: it cannot.
    """
    if path.suffix != ".json":
        raise InputError(f"--out {path}: expected a file name ending in .json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"--out {path}: {error.strerror}") from None
    for each in (path, path.with_suffix(".md")):
        if each.is_dir():
            raise InputError(f"--out {path}: {each} is a directory; use another name")


def command() -> str:
    """The command line that reproduces the run."""
    started = Path(sys.argv[0])
    name = started.parent.name if started.stem == "__main__" else started.stem
    return shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])


def commit() -> str | None:
    """The commit of the checkout, with ``-dirty`` if files differ from it; None without git."""
    words = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        found = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def measured_on() -> str:
    """One line with command, hardware, versions, commit and date."""
    machine, found, code = hardware(), versions(), commit()
    place = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cpu_cores']} cores"
    return (
        f"`{command()}`: {place}, {torch.get_num_threads()} threads; torch {found['torch']}; "
        f"{f'commit {code}; ' if code else ''}{date.today().isoformat()}"
    )


def without_gpu(device: str) -> list[str]:
    """A note that GPUs were not measured, if `device` is the CPU."""
    return [f"GPU: {NOT_MEASURED}."] if device == "cpu" else []


def number(value: float) -> str:
    """`value` to three significant digits, without rounding the integer part."""
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}"


def with_spread(spread: Spread) -> str:
    """The median, followed by the quartiles."""
    return f"{number(spread.median)} ({number(spread.low)}..{number(spread.high)})"
