"""Text as a list of documents, split into a training part and a held-out part.

A document is one file, one ``.jsonl`` record, or one row of a saved data set. Duplicates are
dropped, so the two parts never share a document.
"""

from __future__ import annotations

import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from arg_dist.cli.parsing import InputError

PYTHON_SOURCE_BYTES = 32 * 2**20
"""Bytes of installed Python source to read when the user names no data."""

_LARGEST_SOURCE_FILE = 2**18  # larger Python files are generated tables
_HELD_OUT_SHARE = 0.03


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents, and a description of their source."""

    training: list[bytes]
    held_out: list[bytes]
    source: str


def read_corpus(
    data: Sequence[str] = (), *, text_key: str = "text", max_bytes: int | None = None
) -> Corpus:
    """Reads `data` (see :func:`documents_of`), by default the installed Python source.

    `max_bytes` limits the total; documents that no longer fit are skipped.

    Raises:
        InputError: a path does not exist, or contains no text.
    """
    if data:
        documents: Iterable[bytes] = (
            document for path in data for document in documents_of(path, text_key)
        )
        source = ", ".join(data)
    else:
        documents = (path.read_bytes() for path in installed_python_files())
        source = "the installed Python source"
        max_bytes = PYTHON_SOURCE_BYTES if max_bytes is None else max_bytes
    training, held_out = split(distinct(documents, max_bytes))
    if not training:
        raise InputError(f"--data {source}: no text found")
    return Corpus(training, held_out, source)


def documents_of(pattern: str, text_key: str, option: str = "--data") -> Iterator[bytes]:
    """Yields the documents at a path: a file, a directory, a glob, or a saved data set.

    ``.jsonl`` files and data sets (``datasets.save_to_disk``) hold one document per row, under
    `text_key`. Error messages name `option`, the command-line option of the path.
    """
    path = Path(pattern)
    if path.is_dir() and any(
        (path / name).exists() for name in ("state.json", "dataset_dict.json")
    ):
        yield from _saved_data_set(path, text_key, option)
        return
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    elif path.exists():
        files = [path]
    else:
        files = sorted(Path(found) for found in glob.glob(pattern, recursive=True))
        files = [file for file in files if file.is_file()]
        if not files:
            raise InputError(f"{option} {pattern}: no such file, directory or matching pattern")
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise InputError(f"{option} {file}: {error.strerror}") from None
        if file.suffix == ".jsonl":
            yield from _records(file, content, text_key, option)
        else:
            yield content


def _records(file: Path, content: bytes, text_key: str, option: str) -> Iterator[bytes]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)[text_key].encode()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f'{option} {file}, line {number}: a JSON object with a string under "{text_key}" '
                "is needed; select another key with --text-key"
            ) from None


def _saved_data_set(path: Path, text_key: str, option: str) -> Iterator[bytes]:
    import datasets

    loaded = datasets.load_from_disk(str(path))
    parts = loaded.values() if isinstance(loaded, datasets.DatasetDict) else [loaded]
    for part in parts:
        if text_key not in part.column_names:
            raise InputError(
                f'{option} {path}: no column "{text_key}" among {part.column_names}; '
                "select one with --text-key"
            )
        for text in part[text_key]:
            yield text.encode()


def installed_python_files() -> list[Path]:
    """The ``.py`` files of the standard library and of site-packages, in a fixed shuffled order.

    Files are sorted by a hash of their path below the root, so a bounded read samples all of them
    and does not depend on where Python is installed.
    """
    paths = sysconfig.get_paths()
    keyed: dict[str, Path] = {}
    for root in (Path(paths["stdlib"]), Path(paths["purelib"]), Path(paths["platlib"])):
        for file in root.rglob("*.py"):
            below = file.relative_to(root)
            # site-packages inside the standard library are covered by purelib and platlib
            if below.parts[0] in ("site-packages", "dist-packages") or not file.is_file():
                continue
            if file.stat().st_size <= _LARGEST_SOURCE_FILE:
                keyed[hashlib.sha256(str(below).encode()).hexdigest()] = file
    return [keyed[key] for key in sorted(keyed)]


def distinct(documents: Iterable[bytes], max_bytes: int | None = None) -> dict[bytes, bytes]:
    """Non-empty, deduplicated documents by their SHA-256, up to `max_bytes` in total."""
    kept: dict[bytes, bytes] = {}
    total = 0
    for document in documents:
        if max_bytes is not None and total >= max_bytes:
            break
        digest = hashlib.sha256(document).digest()
        fits = max_bytes is None or total + len(document) <= max_bytes
        if document.strip() and fits and digest not in kept:
            kept[digest] = document
            total += len(document)
    return kept


def split(documents: dict[bytes, bytes]) -> tuple[list[bytes], list[bytes]]:
    """Splits into training and held-out documents, by their contents alone.

    Holds out about 3 % of the bytes; of a single document, its end.
    """
    target = _HELD_OUT_SHARE * sum(map(len, documents.values()))
    if len(documents) == 1:
        (document,) = documents.values()
        cut = len(document) - max(1, round(target))
        return [document[:cut]], [document[cut:]]
    held_out: dict[bytes, bytes] = {}
    held_bytes = 0
    for digest in sorted(documents):
        if held_bytes + len(documents[digest]) <= target:
            held_out[digest] = documents[digest]
            held_bytes += len(documents[digest])
    if documents and not held_out:
        # Few, large documents: hold out the smallest.
        smallest = min(documents, key=lambda digest: (len(documents[digest]), digest))
        held_out[smallest] = documents[smallest]
    training = [document for digest, document in documents.items() if digest not in held_out]
    return training, list(held_out.values())
