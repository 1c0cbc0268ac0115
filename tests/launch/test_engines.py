"""Twenty steps give the same losses and ranks under every engine, however many processes."""

from __future__ import annotations

import pytest

from tests.launch import training
from tests.launch.conftest import Runs
from tests.launch.engines import ENGINES, Engine
from tests.tolerances import LOSSES, LOW_PRECISION_LOSSES

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def alone() -> training.Run:
    return training.train(training.one_process("llama"))


@pytest.mark.parametrize(
    ("engine", "processes"),
    [pytest.param(e, n, id=f"{e.name}-{n}") for e in ENGINES for n in e.processes],
)
def test_twenty_steps_are_those_of_one_process(
    runs: Runs, alone: training.Run, engine: Engine, processes: int
) -> None:
    results = runs(engine.launcher, processes)[engine.name]["processes"]
    assert len(results) == processes
    assert {result["engine"] for result in results} == {engine.is_found}
    losses = LOSSES if engine.is_exact else LOW_PRECISION_LOSSES
    training.check(results, alone, losses, ranks=engine.is_exact)
