"""Checkpoints of a run: as many processes go on to the bit, others as they would have."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch import training
from tests.launch.cases import CASES, MOVED, RESUMED
from tests.launch.launching import ROOT, launch
from tests.tolerances import LOSSES, LOW_PRECISION_LOSSES

pytestmark = pytest.mark.timeout(400)

Results = dict[str, Any]


def run(script: str, out: Path, processes: int, *arguments: object) -> Results:
    """What a script under DeepSpeed has written down."""
    finished = launch(
        script,
        *("--out", out, *arguments),
        processes=processes,
        seconds=190,
        launcher="forked",
        variables={"PYTHONPATH": str(ROOT)},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    results: Results = json.loads((out / "results.json").read_text())
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("written")


@pytest.fixture(scope="module")
def written(folder: Path) -> Results:
    """Runs of four processes, from step 8 on; what they saved at step 8 lies in the folder."""
    return run("tests/launch/moved_runs.py", folder, 4)


@pytest.fixture(scope="module")
def resumed(folder: Path, written: Results, tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("resumed")
    return run("tests/launch/resume_runs.py", out, 2, "--moved", folder / "moved")


def whole(processes: list[training.Run]) -> training.Run:
    """A run as one process would have seen it."""
    steps = zip(*(process["ranks"] for process in processes), strict=True)
    ranks = [{name: rank for own in everyone for name, rank in own.items()} for everyone in steps]
    return {"losses": processes[0]["losses"], "ranks": ranks}


@pytest.mark.parametrize("case", RESUMED)
def test_resuming_on_the_same_processes_is_bitwise(resumed: Results, case: str) -> None:
    for process in resumed["resumed"][case]:
        assert process["started anew"] == process["first"]
        assert process["by DeepSpeed"] == process["uninterrupted"]
        assert process["by ours"] == process["uninterrupted"]
        assert process["by DeepSpeed, again"] == process["uninterrupted"]
        assert process["by ours, again"] == process["uninterrupted"]
        assert len(process["by ours"]["losses"]) == 5


@pytest.mark.parametrize("case", MOVED)
def test_deepspeeds_checkpoints_go_on_with_fewer_processes(
    written: Results, resumed: Results, case: str
) -> None:
    exact = CASES[case].precision == "fp32"
    tolerance = LOSSES if exact else LOW_PRECISION_LOSSES
    assert len(resumed["moved"][case][0]["losses"]) == 20
    training.check(resumed["moved"][case], whole(written[case]), tolerance, ranks=exact)


def test_a_run_goes_on_at_another_stage_with_fewer_processes(
    written: Results, resumed: Results
) -> None:
    training.check(resumed["other stage"], whole(written["llama-zero2"]), LOSSES)


def test_what_a_mesh_of_two_dimensions_saves_goes_on_under_zero3(
    written: Results, resumed: Results
) -> None:
    training.check(resumed["from a mesh"], whole(written["mesh"]), LOSSES)


def test_more_processes_without_conversion_are_told_how(resumed: Results) -> None:
    message, note = resumed["refusal"]
    assert "world size of 4" in message
    assert "deepspeed.checkpoint.ds_to_universal --inject_missing_state" in note


@pytest.mark.parametrize("case", [case for case in MOVED if CASES[case].stage > 0])
def test_what_the_converter_asks_for_takes_no_room(written: Results, case: str) -> None:
    numbers = written[case][0]
    weights = 4 * numbers["trained_elements"]
    assert numbers["saved_bytes"] < 1.1 * (weights + numbers["state_bytes"]) + 2**16


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process saw."""
    out: Path = tmp_path_factory.mktemp("accelerated")
    finished = launch(
        "tests/launch/save_state_runs.py",
        *("--out", out),
        processes=2,
        seconds=120,
        launcher="forked",
        variables={"PYTHONPATH": "."},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return [json.loads((out / f"process{i}.json").read_text()) for i in range(2)]


@pytest.mark.parametrize("pair", ["", "-pair"])
@pytest.mark.parametrize(("engine", "found"), [("ddp", "MULTI_CPU"), ("fsdp2", "FSDP")])
def test_accelerates_save_state_brings_back_everything(
    accelerated: list[dict[str, Any]], engine: str, found: str, pair: str
) -> None:
    for process in accelerated:
        result = process[engine + pair]
        assert result["engine"] == found
        assert result["continued"] == result["uninterrupted"]
        assert result["ranks_equal"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_optimizers_of_one_accelerator_go_on(
    accelerated: list[dict[str, Any]], engine: str
) -> None:
    for process in accelerated:
        result = process[f"{engine}-pair"]
        assert result["on_again"] == result["on"]
        assert result["on"][-1] < result["uninterrupted"][0]
