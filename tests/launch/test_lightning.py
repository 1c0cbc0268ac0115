"""Lightning: its strategies on two processes train as one process does, save and resume."""

from typing import Any

import pytest

from tests.launch.launching import seen_by_each
from tests.tolerances import LOSSES

PROCESSES = 2
STRATEGIES = ("ddp", "fsdp2", "fsdp2-one-file")

pytest.importorskip("lightning", reason="lightning is not installed (extra: test)")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process saw, by strategy."""
    script, out = "tests/launch/lightning_runs.py", tmp_path_factory.mktemp("lightning")
    return seen_by_each(script, out, processes=PROCESSES, seconds=110)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_are_those_of_one_process(runs: list[dict[str, Any]], strategy: str) -> None:
    expected = runs[0]["alone"]["losses"]
    for run in runs:
        for loss, alone in zip(run[strategy]["losses"], expected, strict=True):
            LOSSES.check(loss, alone)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resuming_from_its_checkpoint_is_bitwise(runs: list[dict[str, Any]], strategy: str) -> None:
    for run in runs:
        losses, resumed = run[strategy]["losses"], run[strategy]["resumed"]
        assert 0 < len(resumed) < len(losses)
        assert resumed == losses[-len(resumed) :]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_state_is_sharded_and_named_as_in_the_module(
    runs: list[dict[str, Any]], strategy: str
) -> None:
    for run in runs:
        assert run[strategy]["bytes"] < 0.6 * run["alone"]["bytes"]
        assert "model.model.layers.1.mlp.down_proj.weight" in run[strategy]["matrices"]
