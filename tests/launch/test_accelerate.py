"""`accelerate launch` and `torchrun` as a user starts them: shipped files, and what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from launchers.pretraining.models import build_model
from tests.launch.launching import ROOT, Start, alone, launch
from tests.launch.tiny_jobs import llama_config, write_text
from tests.tolerances import LOSSES

SCRIPT = "launchers/train_lm.py"
ON_CPUS_TOO = "tests/launch/cpu_fsdp.py"
YAMLS = "launchers/accelerate"
SETTINGS = ("max_rank=12", "min_rank=2", "energy=0.7", "max_gap=6", "min_gap=3")
JOB = (
    *("--seq-len", 32, "--batch-size", 8, "--steps", 20, "--warmup", 2, "--eval-every", 10),
    *("--eval-batches", 1, "--log-ranks-every", 1, *(f"--set={setting}" for setting in SETTINGS)),
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a few source files: real text, read in a moment."""
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model's configuration, and below it one with its first weights."""
    folder, config = tmp_path_factory.mktemp("model"), llama_config()
    config.save_pretrained(folder)
    fresh = build_model(str(folder), config, seed=0, deepspeed_config={})
    fresh.save_pretrained(folder / "checkpoint")
    return folder


def read(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return json.loads((run / "report.json").read_text()), [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def reference(text: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job on one process, under DeepSpeed without accelerate."""
    out = tmp_path_factory.mktemp("reference")
    config = ("--deepspeed_config", "ds_configs/zero2.json", "--lr", 1e-3)
    job = ("--data", text, "--model", model, "--out", out, *JOB)
    finished = alone(SCRIPT, *config, *job, seconds=100)
    assert finished.returncode == 0, finished.stderr
    return out


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("yaml", "script", "weights", "engine", "options"),
    [
        ("cpu", SCRIPT, ".", "DDP", ("--accumulation", 2)),
        ("ddp", SCRIPT, ".", "DDP", ()),
        ("fsdp2", ON_CPUS_TOO, "checkpoint", "FSDP2", ("--accumulation", 2)),
        ("zero2", SCRIPT, ".", "ZeRO-2 (accelerate)", ("--accumulation", 2)),
        ("zero3", SCRIPT, ".", "ZeRO-3 (accelerate)", ()),
    ],
)
def test_a_shipped_file_trains_as_one_process_does(
    yaml: str,
    script: str,
    weights: str,
    engine: str,
    options: tuple[object, ...],
    text: Path,
    model: Path,
    reference: Path,
    tmp_path: Path,
) -> None:
    words = [SCRIPT] if script != SCRIPT else []
    finished = launch(
        script,
        *(*words, "--data", text, "--model", model / weights, "--out", tmp_path, *JOB, *options),
        processes=2,
        seconds=100,
        launcher="accelerate",
        options=("--config_file", f"{YAMLS}/{yaml}.yaml"),
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "warn" not in finished.stderr.lower(), finished.stderr
    report, lines = read(tmp_path)
    expected, expected_lines = read(reference)
    assert (report["engine"], report["optimizer"]) == (engine, "AdaRankGrad")
    assert (report["world_size"], report["status"]) == (2, "finished")
    assert report["optimizer_settings"] == expected["optimizer_settings"]
    for line, other in zip(lines, expected_lines, strict=True):
        LOSSES.check(line["loss"], other["loss"])
        assert line["lr"] == other["lr"]
        assert line["ranks"] == other["ranks"]
    LOSSES.check(report["final_held_out_loss"], expected["final_held_out_loss"])
    assert max(report["state_bytes"]) < 0.6 * expected["state_bytes"][0]


ADAMW = (*(word for word in JOB if not str(word).startswith("--set")), "--optimizer", "adamw")


def check_adamw(run: Path, engine: str) -> list[float]:
    """That AdamW has trained and says so; its losses."""
    report, lines = read(run)
    assert (report["optimizer"], report["engine"]) == ("AdamW", engine)
    assert report["state_bytes"] == report["adamw_state_bytes"]
    losses = [line["loss"] for line in lines]
    assert losses[-1] < losses[0] - 0.5
    return losses


@pytest.mark.timeout(120)
@pytest.mark.parametrize("launcher", ["forked", "accelerate"])
def test_adamw_trains_to_compare(launcher: Start, text: Path, model: Path, tmp_path: Path) -> None:
    job = ("--data", text, "--model", model, "--out", tmp_path, *ADAMW)
    if launcher == "forked":
        finished = launch(SCRIPT, *job, processes=2, seconds=100, launcher=launcher)
    else:
        options = ("--config_file", f"{YAMLS}/fsdp2.yaml", "--mixed_precision", "bf16")
        finished = launch(
            ON_CPUS_TOO, SCRIPT, *job, processes=2, seconds=100, launcher=launcher, options=options
        )
    assert finished.returncode == 0, finished.stderr[-3000:]
    losses = check_adamw(tmp_path, "DDP" if launcher == "forked" else "FSDP2")
    # not rounded to bf16, not even where two processes' losses are averaged
    assert any(loss * 2**8 % 1 for loss in losses)


def test_adamw_takes_the_place_of_the_jsons_optimizer(
    text: Path, model: Path, tmp_path: Path
) -> None:
    config = json.loads((ROOT / YAMLS / "zero2.json").read_text())
    job = ("--data", text, "--model", model, "--out", tmp_path, "--lr", 1e-3, *ADAMW)
    finished = alone(SCRIPT, *job, seconds=100, variables=plugin(tmp_path / "ds.json", **config))
    assert finished.returncode == 0, finished.stderr
    check_adamw(tmp_path, "ZeRO-2 (accelerate)")


@pytest.mark.timeout(120)
def test_fsdp_that_accelerate_turned_off_is_told(text: Path, tmp_path: Path) -> None:
    finished = launch(
        SCRIPT,
        *("--data", text, "--out", tmp_path / "run"),
        processes=2,
        seconds=100,
        launcher="accelerate",
        options=("--config_file", f"{YAMLS}/fsdp2.yaml"),
    )
    assert finished.returncode != 0
    told = [line for line in finished.stderr.splitlines() if line.startswith("train_lm: ")]
    assert len(told) == 1, finished.stderr
    assert "use_fsdp: " in told[0] and "turned it off" in told[0]
    assert not (tmp_path / "run").exists()


def plugin(path: Path, **sections: Any) -> dict[str, str]:
    """What `accelerate launch` leaves in the environment for a DeepSpeed JSON."""
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **sections}))
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


@pytest.mark.parametrize(
    ("sections", "variables", "words"),
    [
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            {},
            ["zero_force_ds_cpu_optimizer", "DeepSpeedCPUAdam", "set it to false"],
        ),
        (
            {"optimizer": {"type": "AdaRankGrad", "params": {"max_rnak": 3}}},
            {},
            ["optimizer.params.max_rnak", "'max_rank'"],
        ),
        (None, {"ACCELERATE_MIXED_PRECISION": "fp16"}, ["mixed_precision: got fp16", "use bf16"]),
    ],
)
def test_settings_that_cannot_work_get_one_line(
    sections: dict[str, Any] | None,
    variables: dict[str, str],
    words: list[str],
    text: Path,
    model: Path,
    tmp_path: Path,
) -> None:
    job = ("--data", text, "--model", model, "--out", tmp_path / "run", *JOB)
    if sections is not None:
        variables = {**variables, **plugin(tmp_path / "ds.json", **sections)}
    finished = alone(SCRIPT, *job, seconds=60, variables=variables)
    assert finished.returncode == 2
    lines = finished.stderr.strip().splitlines()
    assert len(lines) == 1, finished.stderr
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.timeout(150)
def test_the_optimizer_that_trains_is_looked_at(tmp_path: Path) -> None:
    out = tmp_path / "said.json"
    finished = launch(
        "tests/launch/accelerate_runs.py",
        *("--out", out),
        processes=2,
        seconds=120,
        launcher="forked",
        variables={"PYTHONPATH": str(ROOT)},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    said = json.loads(out.read_text())
    assert said["ddp"] == said["fsdp2"] == said["zero2"] == said["zero3"] == "ours"
    assert "AdamW, not AdaRankGrad" in said["adamw"]
    for case in ("replaced", "replaced, not by ours"):
        assert "DeepSpeedCPUAdam" in said[case] and "zero_force_ds_cpu_optimizer" in said[case]
    assert "FSDP1" in said["fsdp1"] and "fsdp_version=2" in said["fsdp1"]
