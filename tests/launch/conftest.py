"""What the launch tests share: the results of launches that run many cases at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch.cases import BUDGETED, SHARDED, VARIANTS, everywhere
from tests.launch.engines import CHOSEN, ENGINES
from tests.launch.launching import ROOT, Launcher, Start, launch

REAL = 2
"""How many processes are started by the launchers themselves."""

Runs = Callable[[Launcher, int], dict[str, Any]]

ZERO_2 = ["--use_deepspeed", "--zero_stage", 2, "--gradient_clipping", 1.0]
OPTIONS: dict[Launcher, list[object]] = {
    "accelerate": [*ZERO_2, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend=no"]
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Results by case, or by engine, of a launcher and a number of processes; one launch each.

    The launchers themselves start two processes. Other numbers are forked, with what accelerate's
    has put into the environment of the two.
    """
    done: dict[tuple[Launcher, int], dict[str, Any]] = {}
    failed: dict[tuple[Launcher, int], str] = {}
    references = tmp_path_factory.mktemp("references")

    def of(launcher: Launcher, processes: int) -> dict[str, Any]:
        if (launcher, processes) in failed:  # once is enough
            pytest.fail(failed[launcher, processes])
        if (launcher, processes) not in done:
            out: Path = tmp_path_factory.mktemp("runs") / "results.json"
            script, names = what_runs(launcher, processes)
            more = ("--references", references) if launcher == "deepspeed" else ()
            start: Start = launcher if processes == REAL else "forked"
            variables = {}
            if start == "forked" and launcher == "accelerate":
                variables = of(launcher, REAL)["environment"]
            finished = launch(
                script,
                *("--out", out, "--cases", *names, *more),
                processes=processes,
                seconds=380,
                launcher=start,
                options=OPTIONS.get(launcher, ()),
                variables={"PYTHONPATH": str(ROOT), **variables},
            )
            if finished.returncode != 0:
                failed[launcher, processes] = finished.stderr[-6000:]
                pytest.fail(finished.stderr[-6000:])
            done[launcher, processes] = json.loads(out.read_text())
        return done[launcher, processes]

    return of


def what_runs(launcher: Launcher, processes: int) -> tuple[str, list[str]]:
    """The script of a launch, and the names of its cases."""
    if launcher == "deepspeed":
        several = everywhere(processes) + BUDGETED
        cases = {2: several + VARIANTS, 8: SHARDED}.get(processes, several)
        cases = [case for case in cases if case.name in CHOSEN] if CHOSEN else cases
        return "tests/launch/zero_runs.py", [case.name for case in cases]
    here = [e.name for e in ENGINES if e.launcher == launcher and processes in e.processes]
    return "tests/launch/engine_runs.py", here
