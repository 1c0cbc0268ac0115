"""Every shipped DeepSpeed configuration trains.

Those for the Trainer are in test_trainer.py.
"""

import json
from typing import Any

import pytest

from tests.launch.launching import ROOT, launch

CONFIGS = sorted(path.name for path in (ROOT / "ds_configs").glob("zero*.json"))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("zoo") / "results.json"
    finished = launch(
        "tests/launch/config_zoo.py",
        *("--out", out, *(f"ds_configs/{name}" for name in CONFIGS)),
        processes=2,
        seconds=180,
        launcher="forked",
        variables={"PYTHONPATH": str(ROOT)},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    results: dict[str, Any] = json.loads(out.read_text())
    return results


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configuration_trains(zoo: dict[str, Any], name: str) -> None:
    result = zoo[name]
    assert result["optimizer"] == "AdaRankGrad"
    assert result["losses"][-1] < result["losses"][0] - 0.2
    assert f"zero{result['stage']}" in name
    assert ("bf16" in name) == (result["dtype"] == "torch.bfloat16")
    assert result["matrices"] > 0
