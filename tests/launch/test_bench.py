"""The benchmarks as a user starts them, on the smallest shapes; times are not looked at."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import batches
from benchmarks.measuring.contenders import PEERS
from tests.launch.launching import alone, launch


def bench(
    name: str, *words: object, out: Path, seconds: float = 100
) -> tuple[list[dict[str, Any]], str]:
    """The tables that a benchmark leaves in JSON, and those that it leaves in Markdown."""
    finished = alone(f"benchmarks/{name}.py", *words, "--threads", 1, "--out", out, seconds=seconds)
    assert finished.returncode == 0, finished.stderr[-3000:]
    written = out.with_suffix(".md").read_text()
    found: list[dict[str, Any]] = json.loads(out.read_text())["tables"]
    for table in found:
        assert table["title"] in finished.stdout and f"**{table['title']}**" in written
        assert table["samples"]
    return found, written


def test_a_step_and_a_new_basis_are_timed_beside_every_other_optimizer(tmp_path: Path) -> None:
    shapes = ("--models", "pico", "--ranks", 16, "--rounds", 2)
    (table,), written = bench("step", *shapes, "--dtypes", "fp32", "bf16", out=tmp_path / "s.json")
    assert len(table["samples"]) == 2 * 3
    for sample in table["samples"]:
        assert not sample["not_possible"]
        names = {"recommended", "matched", "medium", "no-residual", "adamw", "adamw-fused", *PEERS}
        assert set(sample["seconds"]) == names | {"two products"}
        assert all(len(t["rounds"]) == 2 for t in sample["seconds"].values())
    assert "memory traffic | not measured" in written
    (table,), _ = bench("refresh", *shapes, out=tmp_path / "deep" / "r.json")
    assert len(table["samples"]) == 3
    assert {"galore", "galore, new basis"} < set(table["samples"][0]["seconds"])


def test_memory_and_scaling_start_fresh_processes(tmp_path: Path) -> None:
    small = ("--model", "pico", "--methods", "recommended", "--rank", 16, "--steps", 2)
    (alone_,), _ = bench("memory", *small, "--engines", out=tmp_path / "m.json")
    (sample,) = alone_["samples"]
    assert 0 < sample["temporary"] <= sample["temporary_with_new_bases"]
    assert sample["peak"] > 0 and sample["state"]["storage"] > 0
    options = ("--engines", "ddp", "--processes", 2, "--layers", 1, "--rounds", 2)
    (layers, processes), _ = bench("scaling", *small, *options, out=tmp_path / "s.json")
    assert layers["samples"][0]["layers"] == [1, 2, 4]
    assert layers["samples"][0]["seconds_a_layer"] > 0
    first, second = processes["samples"][0]["processes"]
    assert 0.95 < first["state"]["storage"] / second["state"]["storage"] < 1.05


def test_the_optimizers_share_of_a_step_falls_with_its_tokens(
    capsys: pytest.CaptureFixture[str],
) -> None:
    batches.main(["--model", "pico", "--rounds", "1"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[0].strip() for row in rows] == ["AdamW", *batches.KINDS]
    for row in rows:
        shares = [float(cell.strip(" %")) for cell in row[2:]]
        assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1]


ADAM, PARAMETERS = 8, 857_472
"""Bytes a parameter, and how many there are of `pico` with 257 tokens."""
CASES = {
    "none": ("adamw", 1), "ddp": ("recommended", 2), "zero2": ("adamw", 2),
    "zero3": ("recommended", 2), "fsdp2": ("recommended", 2),
}  # fmt: skip


@pytest.mark.parametrize("engine", CASES)
def test_what_a_process_holds_under_an_engine(engine: str, tmp_path: Path) -> None:
    name, processes = CASES[engine]
    job = {"kind": "training", "engine": engine, "name": name, "model": "pico", "rank": 16}
    job |= {"device": "cpu", "steps": 2, "batch": 1, "length": 16, "threads": 1, "limit": 90}
    (tmp_path / "job.json").write_text(json.dumps(job))
    finished = launch(
        "benchmarks/measuring/job.py", tmp_path / "job.json", tmp_path,
        processes=processes, seconds=100, launcher="forked",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = [json.loads((tmp_path / f"process-{i}.json").read_text()) for i in range(processes)]
    # over all processes, in copies of the model
    weights, gradients = {
        "none": (1, 1), "ddp": (2, 2), "zero2": (3, 1), "zero3": (2, 1),
        "fsdp2": (1, 1),
    }[engine]  # fmt: skip
    total = {key: sum(each[key] for each in found) for key in ("weights", "gradients")}
    padding = 4096
    assert abs(total["weights"] - weights * 4 * PARAMETERS) <= padding
    assert abs(total["gradients"] - gradients * 4 * PARAMETERS) <= padding
    states = [each["state"]["storage"] for each in found]
    if name == "adamw":
        assert abs(sum(states) - ADAM * PARAMETERS) <= padding
    else:
        assert 0 < sum(states) < ADAM * PARAMETERS / 2
    assert max(states) < 1.05 * sum(states) / processes
    assert all(each["peak"] > each["state"]["storage"] for each in found)


def test_sections_for_a_gpu_run_in_processes_of_their_own(tmp_path: Path) -> None:
    words = ("--device", "cpu", "--small", "--sections", "ceilings", "messages")
    (ceilings, messages), _ = bench("gpu/__main__", *words, out=tmp_path / "gpu.json")
    assert (ceilings["status"], messages["status"]) == ("finished", "finished"), messages
    one, two = messages["samples"]
    assert (one["processes"], two["processes"]) == (1, 2)
    for sample in (one, two):
        assert set(sample["exit_codes"]) == {0}, sample
        for report in sample["reports"]:
            assert report["error"] is None and len(report["seconds"]) == 6


def test_the_overhead_of_a_step_is_compared_with_another_checkout() -> None:
    words = ("--matrices", 2, "--rounds", 1, "--against", ".")
    finished = alone("benchmarks/overhead.py", *words, seconds=60)
    assert finished.returncode == 0, finished.stderr[-3000:]
    first, second = (line.split("|")[2:4] for line in finished.stdout.splitlines()[-2:])
    assert all(float(cell) > 0 for cell in (*first, *second))
    finished = alone("benchmarks/overhead.py", "--against", "tests", seconds=60)
    assert finished.returncode == 2 and "--against tests: no checkout" in finished.stderr
