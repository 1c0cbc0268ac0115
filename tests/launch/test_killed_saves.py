"""Nothing that ends a process in the middle of a save takes away the checkpoints before it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_after_a_kill_at_any_moment_the_newest_checkpoint_is_loaded(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    script = [sys.executable, "tests/launch/killed_saves.py", "--out", out]
    with subprocess.Popen(
        [*map(str, script), "--folder", str(tmp_path / "checkpoints")],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as jobs:
        try:
            _, errors = jobs.communicate(timeout=520)
        finally:
            if jobs.poll() is None:
                os.killpg(jobs.pid, signal.SIGKILL)
    assert jobs.returncode == 0, errors[-6000:]
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
