"""Twenty steps give the same losses and ranks under every engine, however many processes."""

from __future__ import annotations

import copy

import pytest

from tests.launch import training
from tests.launch.conftest import Runs
from tests.launch.engines import ENGINES, Engine
from tests.tolerances import LOSSES

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
    training.check(results, alone, engine.losses, ranks=engine.losses is LOSSES)


def test_another_rank_at_one_step_is_seen(alone: training.Run) -> None:
    other = copy.deepcopy(alone)
    other["ranks"][7]["model.layers.0.mlp.up_proj.weight"] += 1
    with pytest.raises(AssertionError, match="step 7"):
        training.check([other], alone, LOSSES)
    with pytest.raises(AssertionError, match="step 7"):
        training.check([alone, other], alone, LOSSES, ranks=False)
