"""Nothing that ends a process in the middle of a save takes away the checkpoints before it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from arg_dist.checkpoint.reading import verified_index
from arg_dist.sharding.communicator import Communicator
from tests.launch.launching import ROOT, environment
from tests.patience import patient

PHASES = {
    "tensors",
    "index",
    "complete, without its name",
    "not the latest yet",
    "removing",
}
"""What a save does that can be told from the files in the folder."""
HIT_AT_RANDOM = 3
"""So many of these phases are hit by kills at random moments, too."""
SECONDS = 400


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
            _, errors = jobs.communicate(timeout=patient(seconds))
        finally:
            if jobs.poll() is None:
                os.killpg(jobs.pid, signal.SIGKILL)
    assert jobs.returncode == 0, errors[-6000:]
    return errors


def killed(kind: str, folder: Path) -> dict[str, Any]:
    """What has been found where jobs were killed."""
    out = folder / f"{kind}.json"
    where = ("--out", out, "--folder", folder / kind)
    phases = ("--phases", HIT_AT_RANDOM, "--hit", *sorted(PHASES))
    run("killed_saves.py", kind, *where, *phases, seconds=SECONDS)
    results: dict[str, Any] = json.loads(out.read_text())
    print(json.dumps(results, indent=1))
    assert results["faults"] == []
    return results


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 20)
def test_after_a_kill_at_any_moment_the_newest_checkpoint_is_loaded(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as both:
        exact = both.submit(killed, "exact", tmp_path)
        at_random = killed("random", tmp_path)
        everywhere = exact.result()
    assert sum(at_random["phases"].values()) >= 50
    assert len(at_random["phases"].keys() & PHASES) >= HIT_AT_RANDOM
    assert len(at_random["survivors"]) == 2
    for words in at_random["survivors"]:
        assert "no response from process" in words and "resume from the last checkpoint" in words
    assert everywhere["phases"].keys() >= PHASES | {"replaced"}
    first, replacing, other = everywhere["calls"]
    assert min(first, replacing) >= 20 and other >= 3


@pytest.mark.timeout(SECONDS + 20)
def test_a_program_that_ends_in_a_save_completes_it_or_leaves_nothing(tmp_path: Path) -> None:
    errors = run("left_saves.py", "--folder", tmp_path, seconds=SECONDS)
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
