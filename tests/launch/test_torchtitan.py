"""torchtitan: its own Trainer trains with AdaRankGrad, saves and resumes; on CPUs."""

from typing import Any

import pytest

from tests.launch.launching import seen_by_each

PROCESSES, STEPS, SAVED_AFTER = 2, 10, 5
WAYS = ("fsdp2", "ddp", "tp")

pytest.importorskip("torchtitan", reason="torchtitan is not installed (extra: test)")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process saw, by kind of parallelism."""
    script, out = "tests/launch/torchtitan_runs.py", tmp_path_factory.mktemp("torchtitan")
    return seen_by_each(script, out, processes=PROCESSES, seconds=110)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("way", WAYS)
def test_its_trainer_trains_with_adarankgrad(runs: list[dict[str, Any]], way: str) -> None:
    for run in runs:
        losses = run[way]["losses"]
        assert (run[way]["optimizer"], len(losses)) == ("AdaRankGrad", STEPS)
        assert losses == runs[0][way]["losses"]
        assert sum(losses[SAVED_AFTER:]) < sum(losses[:SAVED_AFTER]) - 0.5  # the same batches


@pytest.mark.timeout(120)
@pytest.mark.parametrize("way", WAYS)
def test_resuming_from_its_checkpoint_is_bitwise(runs: list[dict[str, Any]], way: str) -> None:
    for run in runs:
        assert run[way]["resumed"] == run[way]["losses"][SAVED_AFTER:]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("way", WAYS)
def test_matrices_are_low_rank_by_their_names_in_the_model(
    runs: list[dict[str, Any]], way: str
) -> None:
    for run in runs:
        assert run[way]["bytes"]
        names = set(run[way]["matrices"])
        assert "layers.1.feed_forward.w2.weight" in names
        assert not names & {"tok_embeddings.weight", "output.weight"}
