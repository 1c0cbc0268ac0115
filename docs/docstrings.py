"""A griffe extension that turns the Sphinx markup of docstrings into Markdown for the site."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|meth|func|mod|attr|data):`~?([^`]+)`")
BORDER = re.compile(r"\s*=+(?: +=+)+\s*")


class SphinxMarkup(griffe.Extension):
    """Rewrites each docstring as soon as it is collected."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Replaces roles by code spans and simple tables by preformatted text."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(docstring: str) -> str:
    """The docstring without Sphinx roles, its simple tables as fenced blocks."""
    paragraphs = re.split(r"\n[ \t]*\n", ROLE.sub(r"`\1`", docstring))
    return "\n\n".join(map(_fenced_table, paragraphs))


def _fenced_table(paragraph: str) -> str:
    lines = paragraph.splitlines()
    is_table = len(lines) > 2 and BORDER.fullmatch(lines[0]) and BORDER.fullmatch(lines[-1])
    if not is_table:
        return paragraph
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    cells = (line.replace("``", "  ").rstrip() for line in lines)
    return "\n".join([f"{indent}```text", *cells, f"{indent}```"])
