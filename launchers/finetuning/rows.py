"""Labelled texts from csv, tsv and jsonl files; errors name the file and the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from arg_dist.cli.parsing import InputError

FORMATS = (".csv", ".tsv", ".jsonl")

Cells = dict[str, object]
Line = tuple[int, Cells]
"""A row and the number of its first line, from 1."""


@dataclass(frozen=True)
class Columns:
    """The columns of a row: header names, jsonl keys, or column numbers from 1.

    Numbers are for csv and tsv files without a header. `pair` is the second text, if there is one.
    """

    text: str
    label: str
    pair: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The required columns."""
        return (self.text, self.label) if self.pair is None else (self.text, self.label, self.pair)

    @property
    def numbered(self) -> bool:
        """Whether they are numbers.

        Raises:
            InputError: some are numbers and some are names.
        """
        numbers = [name.isdecimal() and int(name) > 0 for name in self.names]
        if any(numbers) and not all(numbers):
            raise InputError(
                "--text-key, --label-key, --pair-key: pass all as numbers (files without a "
                f"header) or all as names, got {', '.join(self.names)}"
            )
        return all(numbers)


@dataclass(frozen=True)
class Row:
    """One labelled text, and its place: ``"train.csv, line 3"``."""

    text: str
    pair: str | None
    label: str
    where: str


def read_rows(paths: Sequence[str], columns: Columns, option: str) -> list[Row]:
    """The rows of all files, in order; blank lines are skipped.

    Raises:
        InputError: a file cannot be read, a row is malformed, or a file has no rows; the message
            begins with `option`, the file and the line.
    """
    return [row for path in paths for row in _rows_of(Path(path), columns, option)]


def _rows_of(path: Path, columns: Columns, option: str) -> list[Row]:
    if path.suffix not in FORMATS:
        raise InputError(f"{option} {path}: the extension must be one of {', '.join(FORMATS)}")
    text = _read(path, option)
    numbered = columns.numbered
    if path.suffix == ".jsonl":
        if numbered:
            raise InputError(
                f"{option} {path}: rows of .jsonl have keys, not column numbers; pass the keys"
            )
        lines = _objects(text, path, option)
    else:
        lines = _table(text, path, option, numbered=numbered)
    rows = [_row(cells, columns, f"{path}, line {number}", option) for number, cells in lines]
    if not rows:
        raise InputError(f"{option} {path}: contains no rows")
    return rows


def _read(path: Path, option: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{option} {path}, line {number}: not UTF-8 text") from None


def _objects(text: str, path: Path, option: str) -> Iterator[Line]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except ValueError:
            cells = None
        if not isinstance(cells, dict):
            raise InputError(f"{option} {path}, line {number}: a JSON object is needed")
        yield number, cells


def _table(text: str, path: Path, option: str, *, numbered: bool) -> Iterator[Line]:
    records = _records(text, path, option)
    header: list[str] | None = None
    for number, cells in records:
        if header is None:
            header = [str(i) for i in range(1, len(cells) + 1)] if numbered else cells
            if len(set(header)) < len(header):
                raise InputError(
                    f"{option} {path}, line {number}: a column name occurs twice: {header}"
                )
            if not numbered:
                continue
        if len(cells) != len(header):
            raise InputError(
                f"{option} {path}, line {number}: {len(cells)} columns, but the first line has "
                f"{len(header)}"
            )
        yield number, dict(zip(header, cells, strict=True))


def _records(text: str, path: Path, option: str) -> Iterator[tuple[int, list[str]]]:
    # Tab-separated files have no quoting: quotation marks belong to the text.
    if path.suffix == ".tsv":
        reader = csv.reader(io.StringIO(text, newline=""), "excel-tab", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    first = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield first, cells
            first = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{option} {path}, line {first}: {error}") from None


def _row(cells: Cells, columns: Columns, where: str, option: str) -> Row:
    for name in columns.names:
        if name not in cells:
            raise InputError(
                f"{option} {where}: no column {name!r} among {', '.join(cells)}; select columns "
                "with --text-key, --label-key and --pair-key (numbers for files without a header)"
            )
    text = _text(cells[columns.text], columns.text, where, option)
    pair = None if columns.pair is None else _text(cells[columns.pair], columns.pair, where, option)
    label = cells[columns.label]
    if not isinstance(label, (str, int)) or str(label).strip() == "":
        raise InputError(
            f"{option} {where}: {columns.label!r} must be a label, a string or a whole number, "
            f"got {label!r}"
        )
    return Row(text, pair, str(label).strip(), where)


def _text(value: object, name: str, where: str, option: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{option} {where}: {name!r} must be a non-empty text, got {value!r}")
    return value


def label_names(rows: Iterable[Row], option: str) -> list[str]:
    """The distinct labels, sorted as numbers if all of them are, else as strings.

    Raises:
        InputError: there are fewer than two.
    """
    names = {row.label for row in rows}
    if len(names) < 2:
        raise InputError(
            f"{option}: at least two labels are needed, found only {', '.join(map(repr, names))}"
        )
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


def label_numbers(rows: Sequence[Row], names: Sequence[str], option: str) -> list[int]:
    """Each row's label as its index in `names`.

    Raises:
        InputError: a label is not among them.
    """
    numbers = {name: number for number, name in enumerate(names)}
    for row in rows:
        if row.label not in numbers:
            raise InputError(
                f"{option} {row.where}: the label {row.label!r} does not occur in the training "
                f"data, which has: {', '.join(names)}"
            )
    return [numbers[row.label] for row in rows]
