"""Where figures go: JSON with all rounds, and a table for the terminal and for Markdown."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from arg_dist.report.summary import hardware, versions


@dataclass(frozen=True)
class Figures:
    """What one benchmark found.

    Attributes:
        title: what was measured.
        columns: titles of the table's columns.
        rows: cells of the table.
        notes: what a reader of the table must know.
        samples: every number behind it, as JSON.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    samples: list[dict[str, Any]] = field(default_factory=list)

    def markdown(self) -> str:
        """The table as Markdown, with what it was measured on."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return "\n\n".join([table, *self.notes, measured_on()]) + "\n"

    def show(self, console: Console) -> None:
        """Prints the table."""
        table = Table(title=self.title, title_justify="left")
        for i, name in enumerate(self.columns):
            table.add_column(name, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for note in (*self.notes, measured_on()):
            console.print(note, markup=False, highlight=False)

    def write(self, path: Path) -> None:
        """Writes `path`, JSON, and the same name with ``.md``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {
            "title": self.title,
            "command": command(),
            "date": date.today().isoformat(),
            "hardware": hardware(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "samples": self.samples,
        }
        path.write_text(json.dumps(whole, indent=1) + "\n")
        path.with_suffix(".md").write_text(self.markdown())


def command() -> str:
    """The command line, as it can be given again."""
    return shlex.join(["python", "-m", "arg_dist.bench", *sys.argv[1:]])


def measured_on() -> str:
    """Command, hardware, versions and date, in one line."""
    machine, found = hardware(), versions()
    place = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cpu_cores']} cores"
    return (
        f"`{command()}`: {place}, {torch.get_num_threads()} threads; torch {found['torch']}; "
        f"{date.today().isoformat()}"
    )
