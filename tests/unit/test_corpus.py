"""The corpus: what is read, what is held out, and which sequences a step gets."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from arg_dist.cli.parsing import InputError
from launchers.pretraining.corpus import (
    Corpus,
    distinct,
    installed_python_files,
    read_corpus,
    split,
)
from launchers.pretraining.tokens import ByteTokenizer, Sequences

pytestmark = pytest.mark.unit


def texts(count: int, size: int = 100) -> list[bytes]:
    return [f"{number:04d}".encode() * (size // 4) for number in range(count)]


@pytest.fixture
def sequences() -> Sequences:
    tokens = np.arange(1000, dtype=np.uint16)
    return Sequences(tokens, tokens, length=16, seed=3, vocab_size=1000, source="numbers")


def test_a_document_is_in_one_part_only_and_duplicates_are_dropped(tmp_path):
    for number, text in enumerate(texts(50) + texts(50)):
        (tmp_path / f"{number:03d}.txt").write_bytes(text)
    corpus = read_corpus([str(tmp_path)])
    assert sorted(corpus.training + corpus.held_out) == texts(50)
    assert len(corpus.held_out) == 1  # 3 % of 50 equal documents


def test_the_split_depends_on_contents_and_not_on_order():
    documents = distinct(texts(200))
    backwards = dict(reversed(documents.items()))
    assert set(split(documents)[1]) == set(split(backwards)[1])


def test_one_document_is_cut_and_its_end_is_held_out():
    text = bytes(range(200))
    training, held_out = split(distinct([text]))
    assert training[0] + held_out[0] == text
    assert len(held_out[0]) == 6


def test_of_few_large_documents_the_smallest_is_held_out():
    large, small = b"a" * 100, b"b" * 90
    assert split(distinct([large, small])) == ([large], [small])


def test_reading_stops_at_max_bytes():
    kept = distinct(texts(50), max_bytes=1000)
    assert sum(map(len, kept.values())) == 1000


def test_jsonl_globs_and_files_can_be_given_together(tmp_path):
    (tmp_path / "a.txt").write_text("alpha")
    records = tmp_path / "b.jsonl"
    records.write_text("\n".join(json.dumps({"body": word}) for word in ("beta", "gamma")))
    corpus = read_corpus([str(tmp_path / "*.txt"), str(records)], text_key="body")
    assert sorted(corpus.training + corpus.held_out) == [b"alpha", b"beta", b"gamma"]


def test_a_saved_data_set_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(str(tmp_path / "set"))
    corpus = read_corpus([str(tmp_path / "set")])
    assert sorted(corpus.training + corpus.held_out) == [b"one", b"two"]
    with pytest.raises(InputError, match="no column \"body\" among \\['text'\\]"):
        read_corpus([str(tmp_path / "set")], text_key="body")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", "", "no text found"),
        ("bad.jsonl", '{"text": "fine"}\n{"txt": 1}', "line 2: a JSON object"),
        ("bad.jsonl", "not json", "line 1: a JSON object"),
    ],
)
def test_unusable_data_is_told_with_its_path(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as told:
        read_corpus([str(path)])
    assert name in str(told.value)
    assert "\n" not in str(told.value)


def test_the_installed_python_source_comes_in_a_fixed_order():
    files = installed_python_files()
    assert len(files) > 500
    assert len(set(files)) == len(files)
    # Mixed: the first hundred come from many packages.
    assert len({file.parent for file in files[:100]}) > 20


def test_bytes_become_tokens_and_each_document_is_closed():
    tokens = ByteTokenizer().encode([b"ab", b"", b"\xff"])
    assert tokens.tolist() == [97, 98, 257, 257, 255, 257]


def test_a_sequence_is_a_function_of_seed_step_and_index(sequences):
    whole = sequences.batch(5, range(8))
    assert whole.shape == (8, 16)
    assert whole.dtype == torch.int64
    parts = [sequences.batch(5, range(start, start + 2)) for start in range(0, 8, 2)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(sequences.batch(6, range(8)), whole)


def test_held_out_sequences_cover_the_whole_stream(sequences):
    first, *_, last = sequences.held_out_batch(range(4), 4)
    assert first[0] == 0
    assert last[-1] == 999


def test_text_shorter_than_one_sequence_is_told():
    corpus = Corpus([b"long enough for all" * 9], [b"short"], source="the test")
    with pytest.raises(InputError, match=r"--seq-len 64: the held-out part of the test has only 6"):
        Sequences.of(corpus, ByteTokenizer(), length=64, seed=0)
