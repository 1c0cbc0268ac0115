"""The engines' own checkpoints: the same processes go on as if they had never stopped."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch.cases import RESUMED
from tests.launch.launching import launch


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("resumed")
    finished = launch("tests/launch/resume_runs.py", "--out", out, processes=2, seconds=120)
    assert finished.returncode == 0, finished.stderr[-4000:]
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return results


@pytest.mark.parametrize("case", RESUMED)
def test_resuming_on_the_same_processes_is_bitwise(resumed: dict[str, Any], case: str) -> None:
    assert resumed[case]["continued"] == resumed[case]["uninterrupted"]
    assert len(resumed[case]["continued"]) == 5


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process saw."""
    out: Path = tmp_path_factory.mktemp("accelerated")
    finished = launch(
        "tests/launch/save_state_runs.py",
        *("--out", out),
        processes=2,
        seconds=120,
        launcher="torchrun",
        variables={"PYTHONPATH": "."},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return [json.loads((out / f"process{i}.json").read_text()) for i in range(2)]


@pytest.mark.parametrize(("engine", "found"), [("ddp", "MULTI_CPU"), ("fsdp2", "FSDP")])
def test_accelerates_save_state_brings_back_everything(
    accelerated: list[dict[str, Any]], engine: str, found: str
) -> None:
    for process in accelerated:
        assert process[engine]["engine"] == found
        assert process[engine]["continued"] == process[engine]["uninterrupted"]
        assert process[engine]["ranks_equal"]
