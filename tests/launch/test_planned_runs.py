"""What `arg-dist plan` says is what runs take, to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch.launching import ROOT, launch
from tests.launch.planned_cases import CASES, Case
from tests.launch.planned_checks import check_exact, check_temporaries, planned

pytestmark = pytest.mark.timeout(400)

PROCESSES = 2
MEASURED = [case for case in CASES if case.has_temporaries]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    out: Path = tmp_path_factory.mktemp("planned") / "results.json"
    finished = launch(
        "tests/launch/planned_runs.py",
        *("--out", out),
        processes=PROCESSES,
        seconds=380,
        launcher="forked",
        variables={"PYTHONPATH": str(ROOT)},
    )
    assert finished.returncode == 0, finished.stderr[-6000:]
    found: dict[str, list[dict[str, Any]]] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_takes_what_was_planned(runs: dict[str, list[dict[str, Any]]], case: Case) -> None:
    check_exact(case, planned(case, PROCESSES), runs[case.name])


@pytest.mark.parametrize("case", MEASURED, ids=lambda case: case.name)
def test_temporaries_are_near_to_what_was_planned(
    runs: dict[str, list[dict[str, Any]]], case: Case
) -> None:
    check_temporaries(case, planned(case, PROCESSES), runs[case.name])
