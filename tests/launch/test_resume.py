"""DeepSpeed's own checkpoints: the same processes go on as if they had never stopped."""

import json
from typing import Any

import pytest

from tests.launch.launching import launch


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("resumed")
    finished = launch("tests/launch/resume_runs.py", "--out", out, processes=2, seconds=120)
    assert finished.returncode == 0, finished.stderr[-4000:]
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return results


@pytest.mark.parametrize(
    "case", ["llama-zero1", "llama-zero2", "llama-zero3", "zero2-bf16", "zero3-bf16"]
)
def test_resuming_on_the_same_processes_is_bitwise(resumed: dict[str, Any], case: str) -> None:
    assert resumed[case]["continued"] == resumed[case]["uninterrupted"]
    assert len(resumed[case]["continued"]) == 5


def test_state_of_another_process_is_refused(resumed: dict[str, Any]) -> None:
    # at stage 0 DeepSpeed keeps the state of process 0 only
    for told in resumed["llama-zero0"]["continued"]:
        assert "process 1 of 2 was given optimizer state that another process saved" in told
