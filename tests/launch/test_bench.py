"""The benchmarks as a user starts them, on the smallest shapes; times are not looked at."""

import json
from pathlib import Path
from typing import Any

from tests.launch.launching import alone

MAIN = "arg_dist/bench/__main__.py"


def bench(*words: object, out: Path, seconds: float = 100) -> tuple[list[dict[str, Any]], str]:
    """The tables that a benchmark leaves in JSON, and those that it leaves in Markdown."""
    finished = alone(MAIN, *words, "--threads", 1, "--out", out, seconds=seconds)
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
        names = {"recommended", "no-residual", "adamw", "adamw-fused", "galore", "apollo", "fira"}
        assert set(sample["seconds"]) == names | {"two products"}
        assert all(len(t["rounds"]) == 2 for t in sample["seconds"].values())
    assert "memory traffic | not measured" in written
    (table,), _ = bench("refresh", *shapes, out=tmp_path / "deep" / "r.json")
    assert len(table["samples"]) == 3
    assert {"galore", "galore, new basis"} < set(table["samples"][0]["seconds"])
