"""Nothing that ends a process in the middle of a save takes away the checkpoints before it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from arg_dist.checkpoint.reading import verified_index
from arg_dist.sharding.communicator import Communicator
from tests.launch.launching import ROOT, environment

PHASES = {
    "tensors",
    "index",
    "complete, without its name",
    "not the latest yet",
    "to be removed",
    "removing",
}
"""What a save does that can be told from the files in the folder."""


def run(script: str, *arguments: object, seconds: float) -> str:
    """Runs a script that forks jobs; what it wrote to stderr. Ends all of them after `seconds`."""
    with subprocess.Popen(
        [sys.executable, f"tests/launch/{script}", *map(str, arguments)],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as jobs:
        try:
            _, errors = jobs.communicate(timeout=seconds)
        finally:
            if jobs.poll() is None:
                os.killpg(jobs.pid, signal.SIGKILL)
    assert jobs.returncode == 0, errors[-6000:]
    return errors


@pytest.mark.slow
def test_after_a_kill_at_any_moment_the_newest_checkpoint_is_loaded(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    run("killed_saves.py", "--out", out, "--folder", tmp_path / "checkpoints", seconds=520)
    results = json.loads(out.read_text())
    print(json.dumps(results, indent=1))
    assert results["faults"] == []
    hit = {way: set(phases) & PHASES for way, phases in results["phases"].items()}
    assert sum(results["phases"]["random"].values()) >= 50
    assert len(hit["random"]) >= 3
    assert hit["exact"] == PHASES
    assert [calls > 2 for calls in results["calls"]] == [True, True]
    assert results["survivors"], "no process was left to find out that another one is gone"
    for words in results["survivors"]:
        assert "resume from the last checkpoint" in words


def test_a_program_that_ends_in_a_save_completes_it_or_leaves_nothing(tmp_path: Path) -> None:
    errors = run("left_saves.py", "--folder", tmp_path, seconds=200)
    results = json.loads((tmp_path / "results.json").read_text())
    for end, codes in results.items():
        assert codes == [end == "error"] * 2, errors
        names = {path.name for path in (tmp_path / end).iterdir()}
        log = (tmp_path / f"{end}-0.log").read_text()
        before = {".claim", "latest", "step-00000001"}
        if end in ("exit", "error"):
            assert names == {*before, "step-00000002"} and log == ""
        elif end == "full disk":
            assert names == before and "the checkpoint of step 2 was not saved" in log
        else:
            assert before <= names <= {*before, "step-00000002", ".step-00000002.partial"}
        if "step-00000002" in names:
            verified_index(tmp_path / end / "step-00000002", Communicator(None))
    assert results.keys() == {"exit", "error", "no groups any more", "full disk"}
