"""DeepSpeed's own checkpoints: the same processes go on as if they had never stopped."""

import json
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
