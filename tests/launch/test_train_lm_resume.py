"""The main job goes on: after signals, a process that stops answering, under other engines."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from arg_dist.checkpoint.rotation import checkpoints_in
from tests.launch.launching import Start, alone, launch
from tests.launch.stopping import metrics, started, wait_for
from tests.launch.tiny_jobs import llama_config, write_text
from tests.tolerances import LOSSES

SCRIPT = "launchers/train_lm.py"
SETTINGS = ("max_rank=12", "min_rank=2", "energy=0.7", "max_gap=6", "min_gap=3", "weight_decay=0")
SMALL = (
    *("--seq-len", 32, "--batch-size", 12, "--warmup", 4, "--eval-every", 16, "--lr", 2e-3),
    *("--eval-batches", 1, "--log-ranks-every", 1, *(f"--set={setting}" for setting in SETTINGS)),
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Options of a small job: some source files, and a tiny model's configuration."""
    text, model = write_text(tmp_path_factory.mktemp("text")), tmp_path_factory.mktemp("model")
    llama_config().save_pretrained(model)
    return "--data", text, "--model", model, *SMALL


def read_report(run: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    return report


def zero(stage: int) -> tuple[object, ...]:
    return "--deepspeed_config", f"ds_configs/zero{stage}.json"


def refused(*arguments: object) -> str:
    """What a single process says that does not want to start."""
    finished = alone(SCRIPT, *arguments, seconds=60)
    assert finished.returncode == 2, finished.stderr
    lines = [line for line in finished.stderr.splitlines() if line.startswith("train_lm: ")]
    assert len(lines) == 1 and "Traceback" not in finished.stderr, finished.stderr
    return lines[0]


@pytest.mark.slow
@pytest.mark.timeout(590)
def test_a_run_that_is_stopped_twice_is_bitwise_the_one_that_is_not(
    job: tuple[object, ...], tmp_path: Path
) -> None:
    words = (*zero(2), *job, "--steps", 80, "--eval-every", 1)
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    finished = launch(SCRIPT, *words, "--out", whole, processes=2, seconds=150, launcher="forked")
    assert finished.returncode == 0, finished.stderr[-3000:]

    saving = (*words, "--save-every", 16, "--resume", "auto", "--time-limit", 6)
    with started(SCRIPT, *saving, "--out", out, processes=2) as launcher:
        wait_for(lambda: len(metrics(out)) >= 5, seconds=90)
        assert launcher.stop(signal.SIGTERM, seconds=30) != 0
    stopped_at = read_report(out)["steps"]
    assert read_report(out)["status"] == "interrupted"
    assert checkpoints_in(out / "checkpoints")[-1].name == f"step-{stopped_at:08d}"

    with started(SCRIPT, *saving, "--out", out, processes=2) as launcher:
        wait_for(lambda: len(metrics(out)) >= stopped_at + 20, seconds=90)
        launcher.workers()[1].send_signal(signal.SIGSTOP)
        # the first process has an error within the limit, and still writes its report
        wait_for(lambda: "train_lm: " in launcher.printed(), seconds=30)
        # whether it waited in a collective of the engine or of the optimizer
        printed = launcher.printed()
        assert "has stopped answering" in printed or "no response from process 1" in printed
        assert "Traceback" not in printed
    assert read_report(out)["status"] == "failed"
    killed_at = read_report(out)["steps"]

    finished = launch(SCRIPT, *saving, "--out", out, processes=2, seconds=150, launcher="forked")
    assert finished.returncode == 0, finished.stderr[-3000:]
    report, lines = read_report(out), metrics(out)
    resumed_at = [part["first_step"] - 1 for part in report["parts"]]
    assert resumed_at[:2] == [0, stopped_at] and killed_at - 20 < resumed_at[2] <= killed_at
    assert f"resumed: {out}/checkpoints/step-{resumed_at[2]:08d}" in finished.stdout
    assert report["status"] == "finished"
    for line, other in zip(lines, metrics(whole), strict=True):
        for key in ("step", "loss", "lr", "tokens", "ranks", "energy", "held_out_loss"):
            assert line.get(key) == other.get(key), (line["step"], key)
    for save in report["saves"]:
        assert lines[save["step"] - 1]["save_seconds"] > 0 and save["stall_seconds"] > 0
        assert save["write_seconds"] > 0 and save["bytes"] > 2**19
    assert "checkpoints" in finished.stdout and "stall" in finished.stdout


@pytest.mark.slow
@pytest.mark.timeout(590)
def test_a_run_goes_from_engine_to_engine(job: tuple[object, ...], tmp_path: Path) -> None:
    """Every engine and two launchers; with a constant learning rate, --steps may end each part."""
    words = (*job, "--warmup", 0, "--min-lr-ratio", 1)
    whole, out = tmp_path / "whole", tmp_path / "moved"
    fsdp2 = ("--config_file", "launchers/accelerate/fsdp2.yaml")
    on_cpus_too = "tests/launch/cpu_fsdp.py"
    parts: list[tuple[Start, int, str, tuple[object, ...], tuple[object, ...]]] = [
        ("forked", 4, SCRIPT, (), zero(2)),
        ("deepspeed", 2, SCRIPT, (), zero(3)),
        ("accelerate", 3, on_cpus_too, fsdp2, (SCRIPT,)),
        ("forked", 1, SCRIPT, (), ()),
        ("forked", 2, SCRIPT, (), ()),
    ]
    saving = ("--resume", "auto", "--save-every", 2, "--keep", 2, "--out", out)
    broken = Path()
    for number, (launcher, processes, script, options, first) in enumerate(parts, start=1):
        finished = launch(
            script,
            *(*first, *words, *saving, "--steps", 4 * number),
            processes=processes,
            seconds=150,
            launcher=launcher,
            options=options,
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        there = checkpoints_in(out / "checkpoints")
        assert [path.name[-2:] for path in there] == [f"{4 * number - 2:02}", f"{4 * number:02}"]
        told = finished.stdout
        if number == 1:
            assert "starting from the beginning" in told
        elif number == len(parts):
            assert "passed over: " in told and f"{broken}: damaged" in told
            assert "step-00000014, step 14, written by 1 process" in told
        else:
            assert f"step {4 * number - 4}, written by {parts[number - 2][1]} process" in told
        broken = sorted(there[-1].glob("process-*"))[0]
        if number == len(parts) - 1:  # a bit is flipped on the disk
            content = bytearray(broken.read_bytes())
            content[len(content) // 2] ^= 1
            broken.write_bytes(content)
    report = read_report(out)
    assert [(part["engine"], part["world_size"]) for part in report["parts"]] == [
        ("ZeRO-2", 4), ("ZeRO-3", 2), ("FSDP2", 3), ("DDP", 1), ("DDP", 2),
    ]  # fmt: skip

    finished = launch(
        SCRIPT, *words, "--steps", 20, "--out", whole, processes=1, seconds=150, launcher="forked"
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    for line, other in zip(metrics(out), metrics(whole), strict=True):
        assert (line["step"], line["tokens"]) == (other["step"], other["tokens"])
        LOSSES.check(line["loss"], other["loss"])
        assert line["ranks"] == other["ranks"]
    LOSSES.check(report["final_held_out_loss"], read_report(whole)["final_held_out_loss"])

    again = refused(*words, "--out", out)
    assert "--resume auto" in again and "step-00000020" in again
    other_seed = refused(*words, "--out", out, "--resume", "auto", "--seed", 1)
    assert "--seed 1" in other_seed and "pass --seed 0" in other_seed
