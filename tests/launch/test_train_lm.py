"""The main job as a user starts it: its reports, its interruption, and its answers to bad input."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.launch.launching import ROOT, Start, alone, compare, launch
from tests.launch.stopping import metrics, started, wait_for

SCRIPT = "launchers/train_lm.py"
CONFIG = ("--deepspeed_config", "ds_configs/zero2.json")
SMALL = ("--seq-len", 32, "--batch-size", 4, "--eval-every", 4, "--eval-batches", 1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a few source files: real text, read in a moment."""
    folder = tmp_path_factory.mktemp("text")
    for source in sorted((ROOT / "arg_dist").glob("*.py")):
        (folder / source.name).write_text(source.read_text())
    return folder


def read_report(run: Path) -> dict[str, Any]:
    """The report of a run, after a look at the files beside it."""
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    return report


@pytest.mark.timeout(200)
def test_reports_show_adarankgrad_next_to_adamw(text: Path, tmp_path: Path) -> None:
    starts: dict[str, Start] = {"adarankgrad": "deepspeed", "adamw": "forked"}
    for optimizer, start in starts.items():
        options = ("--data", text, "--steps", 8, "--optimizer", optimizer, *SMALL)
        out = ("--out", tmp_path / optimizer)
        finished = launch(SCRIPT, *CONFIG, *options, *out, processes=2, seconds=90, launcher=start)
        assert finished.returncode == 0, finished.stderr[-3000:]
        assert "warning" not in finished.stderr.lower()
    ours, adamw = (read_report(tmp_path / name) for name in ("adarankgrad", "adamw"))
    assert ours["status"] == adamw["status"] == "finished"
    assert ours["mean_rank"] >= 1
    assert max(ours["state_bytes"]) < max(adamw["state_bytes"])
    assert adamw["state_bytes"] == ours["adamw_state_bytes"] == adamw["adamw_state_bytes"]
    compared = compare(tmp_path, "adarankgrad", "adamw")
    assert "AdaRankGrad" in compared and "AdamW" in compared


def test_others_wait_for_the_report_longer_than_for_a_step(text: Path, tmp_path: Path) -> None:
    limit = 4
    finished = launch(
        "tests/launch/slow_report.py",
        *(limit + 4, "--data", text, "--steps", 2, *SMALL, "--out", tmp_path),
        *("--time-limit", limit),
        processes=2,
        seconds=90,
        launcher="forked",
        variables={"PYTHONPATH": str(ROOT)},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert read_report(tmp_path)["status"] == "finished"


def test_an_interrupt_leaves_a_valid_report(text: Path, tmp_path: Path) -> None:
    # SIGTERM: test_train_lm_resume.py
    options = ("--data", text, "--steps", 10_000, *SMALL, "--out", tmp_path)
    with started(SCRIPT, *CONFIG, *options, processes=2) as launcher:
        wait_for(lambda: len(metrics(tmp_path)) >= 5, seconds=60)
        assert launcher.stop(signal.SIGINT, seconds=30) != 0
    report = read_report(tmp_path)
    assert report["status"] == "interrupted"
    assert 5 <= report["steps"] < 10_000


def write_config(path: Path, **params: Any) -> Path:
    config = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    config["optimizer"]["params"].update(params)
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("params", "options", "words", "forked"),
    [
        ({"max_rnak": 3}, (), ["optimizer.params.max_rnak", "'max_rank'"], False),
        ({"lr": "fast"}, (), ["optimizer.params.lr", "'fast'"], True),
        ({"max_rank": 4, "min_rank": 8}, (), ["max_rank (4)", "min_rank (8)"], True),
        ({"targets": ["mlpp"]}, (), ["targets", "'mlpp'", "mlp"], True),
        ({}, ("--data", "nowhere.txt"), ["nowhere.txt"], True),
        ({}, ("--data", os.devnull), ["--data", "no text"], True),
        ({}, ("--seq-len", 10**9), ["--seq-len", "1000000000"], True),
        ({}, ("--set", "enrgy=0.5"), ["enrgy", "'energy'"], True),
        ({}, ("--deepspeed_config", "nowhere.json"), ["nowhere.json"], False),
    ],
)
def test_bad_input_gets_one_line(
    params: dict[str, Any],
    options: tuple[object, ...],
    words: list[str],
    forked: bool,
    text: Path,
    tmp_path: Path,
) -> None:
    config = write_config(tmp_path / "config.json", **params)
    words_given = ("--deepspeed_config", config, "--data", text, "--steps", 2, *options)
    finished = alone(SCRIPT, *words_given, "--out", tmp_path / "run", seconds=60, forked=forked)
    assert finished.returncode == 2
    lines = finished.stderr.strip().splitlines()
    assert len(lines) == 1, finished.stderr
    assert all(word in lines[0] for word in words), lines[0]


def test_a_world_size_that_does_not_divide_the_batch_gets_one_line(text: Path) -> None:
    options = ("--data", text, "--batch-size", 7)
    finished = launch(SCRIPT, *CONFIG, *options, processes=2, seconds=60)
    assert finished.returncode != 0
    lines = [line for line in finished.stderr.splitlines() if "7" in line and "2" in line]
    assert len(lines) == 1, finished.stderr
    assert "Traceback" not in finished.stderr
