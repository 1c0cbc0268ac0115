"""The benchmark of links, in short: every number is there, and is what the link allows."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.hosts.hosts import hosts, run_python, told_without_root
from tests.hosts.jobs import SmallJob

MEGABITS = 40
STEPS = 4


def bench(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "benchmarks.network", *words, folder=folder, seconds=200)


@pytest.mark.slow
@pytest.mark.timeout(590)
def test_a_short_benchmark(job: SmallJob, tmp_path: Path) -> None:
    with hosts(1):  # skips
        pass
    out = tmp_path / "out"
    sizes = ("--batch-size", 12, "--seq-len", 32, "--steps", STEPS, "--warmup-steps", 2)
    once = ("--bandwidths", f"{MEGABITS}M", "--methods", "adarankgrad", "--repeats", 1)
    trained = (*sizes, "--model", job.model, "--data", job.text)
    finished = bench(*trained, *once, "--out", out, folder=tmp_path)
    assert finished.returncode == 0, finished.stderr[-4000:]
    results = json.loads((out / "network.json").read_text())
    assert (
        results["command"].startswith("python -m benchmarks.network --batch-size 12 ")
        and results["hardware"]["cpu_cores"]
    )
    (row,) = results["rows"]
    assert row["bits_per_second"] == MEGABITS * 1e6 and row["optimizer"] == "adarankgrad"
    # gradients are summed and weights handed out again; two hosts send half of each
    weights = 4 * json.loads(next(out.glob("*/run/report.json")).read_text())["model_parameters"]
    for direction in ("sent", "received"):
        assert 0.9 * weights < row[direction] < 2.5 * weights
    assert 0 < row["optimizer_bytes"] < row["sent"]
    # what goes through the cable takes its time, for which the processes wait
    least = max(row["sent"], row["received"]) * 8 / (MEGABITS * 1e6)
    assert 0.8 * least < row["seconds"] < 60
    assert 0.5 * least < row["seconds"] * row["waiting"] < row["seconds"]
    assert f"| {MEGABITS} Mbit/s | AdaRankGrad |" in (out / "network.md").read_text()
    assert (out / "network.png").read_bytes().startswith(b"\x89PNG")
    assert f"{MEGABITS} Mbit/s" in finished.stdout

    again = bench(*once, "--out", out, folder=tmp_path)
    assert again.returncode == 2 and "already contains results" in again.stderr

    # a copy on each host, whose gradients are averaged there; between hosts all of them would take
    # as much as the weights
    hsdp = ("--bandwidths", "unlimited", "--methods", "hsdp-sketch", "--repeats", 1)
    alone = bench(*hsdp, "--out", tmp_path / "alone", folder=tmp_path)
    assert alone.returncode == 2 and "give at least 2" in alone.stderr
    shared = ("--processes-per-host", 2, "--out", tmp_path / "hsdp")
    finished = bench(*trained, *hsdp, *shared, folder=tmp_path)
    assert finished.returncode == 0, finished.stderr[-4000:]
    (row,) = json.loads((tmp_path / "hsdp/network.json").read_text())["rows"]
    assert row["optimizer_bytes"] > 0
    for direction in ("sent", "received"):
        assert 0 < row[direction] < 0.6 * weights


def test_without_root_it_says_so(tmp_path: Path) -> None:
    code = "import runpy; runpy.run_module('benchmarks.network', run_name='__main__')"
    (line,) = told_without_root(code, tmp_path).splitlines()
    assert line.startswith("network: cannot create hosts here: ")
    assert "require root" in line or "not found" in line
