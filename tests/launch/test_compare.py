"""A comparison as a user starts it: every method, cut off, gone on with, told."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.launch.launching import ROOT, environment
from tests.launch.tiny_checkpoints import reviews, write_checkpoints
from tests.patience import patient

WITH_PACKAGE = ("normuon", "soap") if find_spec("pytorch_optimizer") else ()
OURS = ("recommended", "pretraining", "paper")
PRETRAINED = ("adamw", "galore", "apollo", "fira", "muon", *WITH_PACKAGE, *OURS)
FINETUNED = ("galore", "lora", "recommended")
RATE = {"adamw": 2e-3, "muon": 2e-3, "normuon": 2e-3, "soap": 2e-3}
REST_RATE = 8e-3
FULL_RANK = ("adamw", "muon", "normuon", "soap")


def words(kind: str, methods: tuple[str, ...], out: Path, *more: object) -> list[str]:
    rates = [f"{name}={RATE.get(name, 1e-2)}" for name in methods]
    every = ("--methods", *methods, "--lrs", *rates, "--seeds", 0, "--jobs", 2, "--out", out)
    return [sys.executable, "-m", "benchmarks.compare", kind, *map(str, (*more, *every))]


def runs(out: Path) -> dict[str, dict[str, Any]]:
    lines = (out / "runs.jsonl").read_text().splitlines()
    found = {run["method"]: run for run in map(json.loads, lines)}
    assert len(found) == len(lines)
    return found


def check(out: Path, methods: tuple[str, ...], printed: str) -> dict[str, dict[str, Any]]:
    """The runs, after a look at what all of them must have."""
    found = runs(out)
    assert set(found) == set(methods)
    for name, run in found.items():
        assert run["status"] == "finished", (name, run["error"])
        matrices = run["state"]["matrices"]
        assert matrices["peak"]["logical"] <= matrices["peak"]["storage"]
        assert matrices["adamw"] == next(iter(found.values()))["state"]["matrices"]["adamw"]
        assert 0 < run["seconds"]["optimizer"] < run["seconds"]["step"]
        assert bool(run["ranks"]) == (name in OURS)
        assert name in printed and f"| {name} |" in (out / "table.md").read_text()
    for picture in ("curves.png", "frontier.png", "progress.png", "ranks.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    return found


@pytest.mark.timeout(500)
def test_pretraining_by_every_method_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be, or not to be: that is the question. " * 400)
    out = tmp_path / "out"
    job = ("--data", tmp_path / "text.txt", "--model", "pico", "--steps", 3, "--warmup", 1)
    job += (
        "--rest-lr",
        REST_RATE,
        "--batch-size",
        2,
        "--seq-len",
        16,
        "--eval-sequences",
        4,
        "--eval-every",
        1,
    )
    command = words("pretrain", PRETRAINED, out, *job)
    first = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    try:
        while not (out / "runs.jsonl").exists():  # the test's own time limit ends this
            assert first.poll() is None
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=patient(60)) == 128 + signal.SIGTERM
    finally:
        first.kill()  # and with it its runs, which look for it
    before = runs(out)
    assert 0 < len(before) < len(PRETRAINED)
    assert not left_behind(out)

    (tmp_path / "text.txt").write_text("other words")  # the tokens are those of the first command
    second = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=patient(350)
    )
    assert second.returncode == 0, second.stderr[-3000:]
    found = check(out, PRETRAINED, second.stdout)
    assert all(found[name] == run for name, run in before.items())
    assert {run["rest_lr"] for run in found.values()} == {REST_RATE}
    losses = [run["final"] for run in found.values()]
    assert len(set(losses)) == len(losses)
    # AdamW's two moments, and Muon's one
    assert found["adamw"]["state"]["matrices"]["peak"]["logical"] > 6_000_000
    shares = {
        name: run["state"]["matrices"]["peak"]["logical"] / run["state"]["matrices"]["adamw"]
        for name, run in found.items()
    }
    assert shares["muon"] == pytest.approx(0.5)
    assert all(shares[name] < 0.2 for name in PRETRAINED if name not in FULL_RANK)
    assert len(json.loads((out / "comparison.json").read_text())["commands"]) == 2


def left_behind(out: Path) -> list[str]:
    """Processes of the comparison in `out` that still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue  # it has ended meanwhile
        if str(out) in line and int(entry.name) != os.getpid():
            found.append(line)
    return found


@pytest.mark.timeout(400)
def test_fine_tuning_by_loras_and_low_rank_methods(tmp_path: Path) -> None:
    write_checkpoints(tmp_path)
    for name in ("in_domain_train", "in_domain_dev", "out_of_domain_dev"):
        rows = [f"x\t{verdict == 'good':d}\t\t{text}" for text, verdict in reviews(192, seed=3)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(rows))
    out = tmp_path / "out"
    job = ("--max-length", 32, "--batch-size", 16, "--steps", 24, "--peer-rank", 4)
    options = words("finetune", FINETUNED, out, *job, "--set", "max_rank=6")[4:]
    finished = subprocess.run(
        ["bash", "benchmarks/cola.sh", tmp_path / "bert", tmp_path, out, *options],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=patient(350),
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = check(out, FINETUNED, finished.stdout)
    assert all(run["measure"] == "matthews" for run in found.values())
    assert all(run["final"] == run["final_measures"]["matthews"] for run in found.values())
    assert all(run["rest_lr"] == run["lr"] for run in found.values())
    assert found["recommended"]["final"] > 0.5  # it learns, from a drawn encoder, in 24 steps
    assert "higher is better" in finished.stdout
