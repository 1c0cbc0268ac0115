"""Workers are killed in mid-run: torchrun starts them again, and training goes on by itself."""

import contextlib
import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch.launching import launch
from tests.launch.stopping import Started, metrics, started, wait_for
from tests.launch.tiny_jobs import llama_config, write_text
from tests.ports import free_port
from tests.tolerances import LOSSES

SCRIPT = "launchers/train_lm.py"
STEPS = 24
KILL_AT = 9
"""The step after which a worker is killed: two checkpoints are there, or the second is written."""
SETTINGS = ("max_rank=12", "min_rank=2", "energy=0.7", "max_gap=6", "min_gap=3")
SMALL = (
    *("--seq-len", 32, "--batch-size", 12, "--accumulation", 6, "--warmup", 4, "--lr", 2e-3),
    *("--steps", STEPS, "--eval-every", 12, "--eval-batches", 1, "--log-ranks-every", 1),
    *(f"--set={setting}" for setting in SETTINGS),
)
SURVIVING = ("--resume", "auto", "--save-every", 4, "--time-limit", 20)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Options of a small job: some source files, and a tiny model's configuration."""
    text, model = write_text(tmp_path_factory.mktemp("text")), tmp_path_factory.mktemp("model")
    llama_config().save_pretrained(model)
    return "--data", text, "--model", model, *SMALL


@pytest.fixture(scope="module")
def undisturbed(job: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes that nobody kills."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    finished = launch(SCRIPT, *job, "--out", out, processes=2, seconds=90, launcher="forked")
    assert finished.returncode == 0, finished.stderr[-3000:]
    return out


def parts(run: Path) -> list[tuple[int, int]]:
    """First step and number of processes of each part of a run, after a look at its metrics."""
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    assert report["status"] == "finished"
    return [(part["first_step"], part["world_size"]) for part in report["parts"]]


def wait_for_end(launch: Started, *, seconds: float) -> None:
    wait_for(lambda: launch.process.poll() is not None, seconds=seconds)
    assert launch.process.returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_worker_is_started_again_and_the_losses_are_those_of_an_undisturbed_run(
    job: tuple[object, ...], undisturbed: Path, tmp_path: Path
) -> None:
    words, restarts = (*job, *SURVIVING, "--out", tmp_path), ("--max-restarts", 2)
    with started(SCRIPT, *words, processes=2, launcher="torchrun", options=restarts) as running:
        wait_for(lambda: bool(metrics(tmp_path)), seconds=60)
        victim = running.workers()[1]
        wait_for(lambda: len(metrics(tmp_path)) >= KILL_AT, seconds=60)
        victim.kill()
        wait_for_end(running, seconds=90)
    whole, resumed = parts(tmp_path)
    assert whole == (1, 2) and resumed in [(step + 1, 2) for step in range(4, STEPS, 4)]
    for line, other in zip(metrics(tmp_path), metrics(undisturbed), strict=True):
        for key in ("step", "loss", "lr", "tokens", "ranks", "energy", "held_out_loss"):
            assert line.get(key) == other.get(key), (line["step"], key)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_training_goes_on_with_fewer_processes(
    job: tuple[object, ...], undisturbed: Path, tmp_path: Path
) -> None:
    """Two launchers as on two machines, of which one goes for good with all that it started."""
    words, endpoint = (*job, *SURVIVING, "--out", tmp_path), f"127.0.0.1:{free_port()}"
    patience = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"

    def machine(*, hosts: bool) -> contextlib.AbstractContextManager[Started]:
        options = (
            *("--nnodes", "1:2", "--max-restarts", 3, "--rdzv-id", "survival"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint),
            *("--rdzv-conf", f"{patience},is_host={hosts}"),
        )
        return started(SCRIPT, *words, processes=1, launcher="torchrun", options=options)

    with machine(hosts=True) as stays, machine(hosts=False) as goes:
        wait_for(lambda: bool(metrics(tmp_path)), seconds=90)
        gone = [psutil.Process(goes.process.pid), *goes.workers()]
        wait_for(lambda: len(metrics(tmp_path)) >= KILL_AT, seconds=60)
        for process in gone:  # the launcher first, which would tell the other one of its end
            process.kill()
        wait_for_end(stays, seconds=120)
    whole, resumed = parts(tmp_path)
    assert whole == (1, 2) and resumed in [(step + 1, 1) for step in range(4, STEPS, 4)]
    for line, other in zip(metrics(tmp_path), metrics(undisturbed), strict=True):
        LOSSES.check(line["loss"], other["loss"])
        assert line["ranks"] == other["ranks"]
