"""The parts of a fine-tuning job: rows, labels, metrics, the loss, the batch, the checkpoint."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from arg_dist.cli.parsing import InputError
from launchers.finetuning.arguments import (
    clipping,
    divide_batch,
    last_checkpoint,
    reporting,
    schedule_of,
    training_arguments,
)
from launchers.finetuning.metrics import classification_metrics, metrics_of_logits
from launchers.finetuning.rows import Columns, Row, label_names, label_numbers, read_rows
from launchers.finetuning.tasks import cross_entropy_share
from tests.tolerances import ROUNDING

pytestmark = pytest.mark.unit

NAMED = Columns("text", "label")
NUMBERED = Columns("4", "2")


def rows_of(path, content, columns=NAMED):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_rows([str(path)], columns, "--train")


def texts(rows):
    return [(row.text, row.label) for row in rows]


def test_a_csv_has_quotes_and_line_breaks_in_cells(tmp_path):
    content = 'label,text\n1,"He said ""no"", twice"\n\n0,"two\nlines"\n1,last\n'
    rows = rows_of(tmp_path / "a.csv", content)
    assert texts(rows) == [('He said "no", twice', "1"), ("two\nlines", "0"), ("last", "1")]
    assert [row.where.rpartition(" ")[2] for row in rows] == ["2", "4", "6"]


def test_a_tsv_without_header_keeps_its_quotation_marks(tmp_path):
    content = 'gj04\t1\t\t"Who," said he.\r\ngj04\t0\t*\tHim "runs.\r\n'
    rows = rows_of(tmp_path / "a.tsv", content, NUMBERED)
    assert texts(rows) == [('"Who," said he.', "1"), ('Him "runs.', "0")]


def test_a_jsonl_has_pairs_and_numbers_as_labels(tmp_path):
    lines = [{"a": "one", "b": "two", "y": 1}, {"a": "drei", "b": "vier", "y": 0}]
    content = "\n\n".join(map(json.dumps, lines)) + "\n"
    rows = rows_of(tmp_path / "a.jsonl", content, Columns("a", "y", "b"))
    assert [(row.text, row.pair, row.label) for row in rows] == [
        ("one", "two", "1"), ("drei", "vier", "0"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "columns", "words"),
    [
        ("a.tsv", "a\t1\t\tx\na\t1\tx\n", NUMBERED, ["line 2", "3 columns", "4"]),
        ("a.tsv", "a\t1\n", NUMBERED, ["line 1", "'4'", "--text-key"]),
        ("a.csv", "words,label\na,1\n", NAMED, ["line 2", "'text'", "words, label"]),
        ("a.csv", "text,text\na,1\n", NAMED, ["line 1", "twice"]),
        ("a.csv", 'text,label\nfine,1\n"open,1\n', NAMED, ["line 3"]),
        ("a.csv", "text,label\n,1\n", NAMED, ["line 2", "'text'", "empty"]),
        ("a.csv", "text,label\na,\n", NAMED, ["line 2", "'label'"]),
        ("a.csv", b"text,label\na,1\n\xff,1\n", NAMED, ["line 3", "UTF-8"]),
        ("a.csv", "text,label\n", NAMED, ["no rows"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n[]\n', NAMED, ["line 2", "JSON object"]),
        ("a.jsonl", '{"text": "a", "label": 0.5}\n', NAMED, ["line 1", "0.5"]),
        ("a.jsonl", '{"text": 3, "label": 0}\n', NAMED, ["line 1", "'text'"]),
        ("a.jsonl", '{"text": "a", "label": 0}\n', NUMBERED, ["keys, not column numbers"]),
        ("a.csv", "a,1\n", Columns("1", "label"), ["all as numbers", "1, label"]),
        ("a.txt", "a,1\n", NAMED, ["a.txt", ".csv, .tsv, .jsonl"]),
    ],
)  # fmt: skip
def test_what_is_broken_is_told_by_file_and_line(tmp_path, name, content, columns, words):
    with pytest.raises(InputError) as told:
        rows_of(tmp_path / name, content, columns)
    message = str(told.value)
    assert "\n" not in message
    assert message.startswith("--t")
    assert all(word in message for word in words), message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"--eval nowhere\.csv: No such file"):
        read_rows(["nowhere.csv"], NAMED, "--eval")


def labelled(*labels):
    return [Row("text", None, label, f"a.csv, line {i}") for i, label in enumerate(labels, 2)]


def test_labels_are_sorted_as_numbers_or_as_words():
    assert label_names(labelled("10", "9", "10"), "--train") == ["9", "10"]
    assert label_names(labelled("no", "yes", "10"), "--train") == ["10", "no", "yes"]
    assert label_numbers(labelled("10", "9"), ["9", "10"], "--eval") == [1, 0]
    with pytest.raises(InputError, match=r"--eval a.csv, line 3: the label 'maybe' .* no, yes"):
        label_numbers(labelled("no", "maybe"), ["no", "yes"], "--eval")
    with pytest.raises(InputError, match="at least two labels"):
        label_names(labelled("1", "1"), "--train")


def test_metrics_of_a_known_confusion():
    labels, predicted = np.array([1, 1, 1, 0, 0, 1]), np.array([1, 1, 0, 0, 1, 1])
    found = classification_metrics(labels, predicted)
    ROUNDING.check(found["accuracy"], 4 / 6)
    ROUNDING.check(found["f1"], 2 * 3 / (2 * 3 + 1 + 1))
    ROUNDING.check(found["matthews"], (3 * 1 - 1 * 1) / (4 * 2 * 4 * 2) ** 0.5)
    logits = np.stack([1 - predicted, predicted], 1).astype(np.float32)
    for predictions in (logits, (logits, None)):
        prediction = types.SimpleNamespace(predictions=predictions, label_ids=labels)
        assert metrics_of_logits()(prediction) == found


def test_a_constant_answer_has_no_correlation_and_many_labels_have_a_mean_f1():
    ones = np.ones(4, int)
    assert classification_metrics(np.array([0, 1, 1, 1]), ones)["matthews"] == 0
    found = classification_metrics(np.array([0, 1, 2, 2]), np.array([0, 1, 2, 0]))
    ROUNDING.check(found["f1"], (2 / 3 + 1 + 2 / 3) / 3)


def test_shares_of_the_loss_add_up_to_the_mean_of_the_batch():
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 3), torch.randint(3, (7,))
    parts = [slice(0, 4), slice(4, 7)]  # uneven, as the last batch of an epoch may be
    shares = [cross_entropy_share({"logits": logits[p]}, labels[p], 7) for p in parts]
    ROUNDING.check(sum(shares), cross_entropy(logits, labels))
    ROUNDING.check(cross_entropy_share({"logits": logits}, labels), cross_entropy(logits, labels))


def test_a_batch_is_divided_over_processes_and_accumulation(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = {}
    assert divide_batch(config, 48, 8) == {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 3,
    }
    assert config["train_batch_size"] == 48
    assert divide_batch({}, None, None)["per_device_train_batch_size"] == 16
    assert divide_batch({"train_batch_size": 8}, None, None)["per_device_train_batch_size"] == 4
    with pytest.raises(InputError, match="--batch-size"):
        divide_batch({}, 5, None)


def test_the_json_and_the_command_line_agree_on_clipping():
    config = {"gradient_clipping": 0.5}
    assert clipping(config, None) == {"max_grad_norm": 0.5}
    assert clipping(config, 2.0) == {"max_grad_norm": 2.0}
    assert config == {"gradient_clipping": 2.0}
    assert clipping({}, None) == {"max_grad_norm": 1.0}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 trains on GPUs")
@pytest.mark.parametrize("config", [None, {"fp16": {"enabled": True}}])
def test_fp16_on_cpus_is_refused_where_it_would_be_ignored(tmp_path, config):
    with pytest.raises(InputError, match="fp16: needs a GPU"):
        training_arguments(tmp_path, config, precision=None if config else "fp16")


def test_where_to_report_must_be_installed():
    assert reporting("none") == {"report_to": "none"}
    with pytest.raises(InputError, match=r"--report-to tensorbord: .* none"):
        reporting("tensorbord")


def test_the_length_of_a_job():
    assert schedule_of(10, 3.0, None, None) == {
        "max_steps": 10, "eval_strategy": "epoch", "save_strategy": "no",
    }  # fmt: skip
    assert schedule_of(None, 2.0, 5, 7) == {
        "num_train_epochs": 2.0,
        "eval_strategy": "steps", "eval_steps": 5,
        "save_strategy": "steps", "save_steps": 7,
    }  # fmt: skip


def test_an_earlier_runs_checkpoints_are_neither_lost_nor_taken_unasked(tmp_path):
    directory = tmp_path / "checkpoints"
    assert last_checkpoint(directory, resume=False) is None
    with pytest.raises(InputError, match="--resume: no checkpoint"):
        last_checkpoint(directory, resume=True)
    for step in (9, 10):
        (directory / f"checkpoint-{step}").mkdir(parents=True)
    assert last_checkpoint(directory, resume=True) == str(directory / "checkpoint-10")
    with pytest.raises(InputError, match="--resume"):
        last_checkpoint(directory, resume=False)
