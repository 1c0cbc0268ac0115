"""The messages that docs/troubleshooting.md and docs/not-supported.md list are the code's own."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("troubleshooting.md", "not-supported.md")
FILLED = re.compile(r"\b(?:NAME|KEY|DIR|FILE|MAX_RESTARTS|[NM])\b|\.\.\.|[=(] *$")
"""What stands for something that a message fills in."""

OF_OTHERS = {"Missing key in checkpoint state_dict", "ZeRORuntimeException"}
"""Of PyTorch's and DeepSpeed's own messages."""


def listed() -> Iterator[str]:
    """The texts in the column of messages, if they are messages at all."""
    for page, column in zip(PAGES, (1, 3), strict=True):
        for line in (ROOT / "docs" / page).read_text().splitlines():
            cells = line.split("|")
            if len(cells) > column + 1:
                yield from (text for text in re.findall("`([^`]+)`", cells[column]) if " " in text)


@cache
def messages() -> str:
    """All texts of the code, one a line; what they fill in is a ``~``."""
    found = []
    for folder in ("arg_dist", "launchers"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (p.value if isinstance(p, ast.Constant) else "~" for p in node.values)
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in found)


@pytest.mark.parametrize("message", sorted(set(listed()) - OF_OTHERS))
def test_a_listed_message_exists(message: str) -> None:
    told = max(re.split(r": got|: ", FILLED.sub("~", message)), key=len)
    longest = max(told.split("~"), key=len).strip(" .,'\"(%")
    if " " not in longest:  # a key, written as a path
        longest = longest.rpartition(".")[2]
    assert len(longest) > 2, "nothing to look for"
    assert longest in messages()
