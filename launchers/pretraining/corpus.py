"""Text as a list of documents, split into a training part and a held-out part.

A document is one file, one ``.jsonl`` record, or one row of a saved data set. Documents with the
same bytes count once, so the two parts never share one.
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
"""How much of the installed Python source is read when the user names no data."""

_LARGEST_SOURCE_FILE = 2**18  # beyond, Python files are generated tables
_HELD_OUT_SHARE = 0.03


@dataclass(frozen=True)
class Corpus:
    """The two parts of a text, and in words where it came from."""

    training: list[bytes]
    held_out: list[bytes]
    source: str


def read_corpus(
    data: Sequence[str] = (), *, text_key: str = "text", max_bytes: int | None = None
) -> Corpus:
    """Reads `data` (see :func:`documents_of`), or without any the installed Python source.

    `max_bytes` bounds what is read; a document that no longer fits is left out.

    Raises:
        InputError: a path leads nowhere, or there is no text in it.
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
    """The documents at a path: files, a directory of them, a glob, or a saved data set.

    ``.jsonl`` files and data sets (``datasets.save_to_disk``) hold one under `text_key` per row.
    Messages name `option`, by which the user gave the path.
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
                f'{option} {file}, line {number}: a JSON object with a text under "{text_key}" is '
                "needed; name another key with --text-key"
            ) from None


def _saved_data_set(path: Path, text_key: str, option: str) -> Iterator[bytes]:
    import datasets

    loaded = datasets.load_from_disk(str(path))
    parts = loaded.values() if isinstance(loaded, datasets.DatasetDict) else [loaded]
    for part in parts:
        if text_key not in part.column_names:
            raise InputError(
                f'{option} {path}: no column "{text_key}" among {part.column_names}; '
                "name one with --text-key"
            )
        for text in part[text_key]:
            yield text.encode()


def installed_python_files() -> list[Path]:
    """The ``.py`` files of the standard library and of site-packages, in a fixed mixed order.

    The order follows a hash of the path below its root, so a bounded reading takes a bit of
    everything, and does not depend on where Python is installed.
    """
    paths = sysconfig.get_paths()
    keyed: dict[str, Path] = {}
    for root in (Path(paths["stdlib"]), Path(paths["purelib"]), Path(paths["platlib"])):
        for file in root.rglob("*.py"):
            below = file.relative_to(root)
            # A standard library may hold site-packages of its own; those come with their root.
            if below.parts[0] in ("site-packages", "dist-packages") or not file.is_file():
                continue
            if file.stat().st_size <= _LARGEST_SOURCE_FILE:
                keyed[hashlib.sha256(str(below).encode()).hexdigest()] = file
    return [keyed[key] for key in sorted(keyed)]


def distinct(documents: Iterable[bytes], max_bytes: int | None = None) -> dict[bytes, bytes]:
    """The documents that are not empty, each once, by their SHA-256, up to `max_bytes` in all."""
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
    """Training and held-out documents; which is which depends on their contents alone.

    About 3 % of the bytes are held out. A single document is cut instead: its end is held out.
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
        # Few, large documents: the smallest of them has to do.
        smallest = min(documents, key=lambda digest: (len(documents[digest]), digest))
        held_out[smallest] = documents[smallest]
    training = [document for digest, document in documents.items() if digest not in held_out]
    return training, list(held_out.values())
