"""The code blocks of README and docs, and what their authors say of running them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from tests.launch.launching import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ("python", "bash")
"""Languages of blocks that a test runs, or that are marked why not."""
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
FENCE = re.compile(r"( *)```(\w*)")


class Block(NamedTuple):
    """One fenced block.

    Attributes:
        language: as its fence says.
        text: what is in it, without the indentation of its fence.
        line: number of its first line in the page.
        reason: why it is not run; None if it is.
    """

    language: str
    text: str
    line: int
    reason: str | None


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found, lines = [], page.read_text().splitlines()
    number = 0
    while number < len(lines):
        fence = FENCE.match(lines[number])
        number += 1
        if fence is None:
            continue
        indent, start = len(fence[1]), number
        while lines[number].strip() != "```":
            number += 1
        text = "".join(f"{line[indent:]}\n" for line in lines[start:number])
        found.append(Block(fence[2], text, start + 1, _reason(lines, start - 1)))
        number += 1
    return found


def checkout_at(folder: Path) -> Path:
    """Fills `folder` with links to what a checkout has, so that code may leave files in it."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name != "runs":
            (folder / entry.name).symlink_to(entry)
    return folder


def _reason(lines: list[str], fence: int) -> str | None:
    above = next((line for line in reversed(lines[:fence]) if line.strip()), "")
    marked = NOT_RUN.search(above)
    return marked[1] if marked else None
