"""Fine-tuning as a user starts it: it learns, reports, goes on from a checkpoint, and answers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launchers.finetuning.rows import Columns
from launchers.finetuning.tasks import text_classification
from tests.launch.launching import ROOT, alone, compare, environment, launch
from tests.launch.tiny_checkpoints import write_checkpoints, write_data
from tests.patience import patient
from tests.tolerances import LOSSES

SCRIPT = "launchers/finetune.py"
ON_CPUS_TOO = "tests/launch/cpu_fsdp.py"
LEARN = ("--lr", 1e-2, "--batch-size", 16, "--max-length", 32)
LOW_RANK = ("--set", "max_rank=6")
LOGS = ("--report-to", "tensorboard")
STEPS = ("--steps", 48, "--eval-every", 4)
CPU = ("--config_file", ROOT / "launchers/accelerate/cpu.yaml")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of checkpoints and data."""
    folder = tmp_path_factory.mktemp("given")
    write_checkpoints(folder)
    write_data(folder)
    return folder


def classification(given: Path, out: Path, *more: object) -> list[str]:
    files = ("--train", given / "train.csv", "--eval", given / "dev.csv")
    words = ("--model", given / "bert", "--task", "classification", *files, *LEARN, *more)
    if "adamw" not in more:
        words += LOW_RANK
    return [str(word) for word in (*words, "--out", out)]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_report(run: Path) -> dict[str, Any]:
    """The report of a run, after a look at the files beside it."""
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    return report


@pytest.fixture(scope="module")
def classifier(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run of one process."""
    out = tmp_path_factory.mktemp("classifier") / "run"
    words = classification(given, out, *STEPS, "--save-every", 24, *LOGS)
    finished = alone(SCRIPT, *words, seconds=90, forked=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "Matthews correlation" in finished.stdout
    assert not finished.stderr.strip(), finished.stderr
    return out


@pytest.mark.timeout(200)
def test_a_classifier_learns_and_reports(classifier: Path) -> None:
    from transformers import pipeline

    report = read_report(classifier)
    assert report["status"] == "finished"
    assert (report["engine"], report["optimizer"]) == ("PyTorch", "AdaRankGrad")
    assert report["measure"] == "matthews"
    assert report["final_measure"] == report["final_measures"]["matthews"] > 0.9
    assert report["final_measures"]["accuracy"] > 0.95
    assert read_metrics(classifier)[3]["matthews"] < report["final_measure"]
    assert 1 <= report["mean_rank"] <= 6
    assert max(report["state_bytes"]) < max(report["adamw_state_bytes"])
    assert 0 < report["low_rank_state_bytes"] < report["low_rank_adamw_bytes"] / 2
    (events,) = classifier.rglob("events.out.tfevents.*")
    assert b"rank_mean" in events.read_bytes()
    judge = pipeline("text-classification", model=str(classifier / "model"))
    assert judge("the film was very good")[0]["label"] == "good"


def test_pairs_are_told_apart_and_long_texts_cut(given: Path, tmp_path: Path) -> None:
    rows = [("the film", "was very good", "yes"), ("the plot was very very fine", "not", "no")]
    lines = [json.dumps(dict(zip("aby", row, strict=True))) for row in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    files = [str(tmp_path / "pairs.jsonl")]
    task = text_classification(
        str(given / "bert"), training=files, held_out=files, columns=Columns("a", "y", "b"),
        max_length=9,
    )  # fmt: skip
    assert task.facts["labels"] == ["no", "yes"]
    assert task.facts["examples_cut_to_max_length"] == [1, 1]
    assert [example["labels"] for example in task.training] == [1, 0]
    assert task.training[0]["token_type_ids"] == [0] * 4 + [1] * 4
    batch = task.collator(task.training)
    assert batch["attention_mask"].sum(1).tolist() == [8, 9]
    model = task.build_model()
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert model(**batch).logits.shape == (2, 2)


@pytest.mark.timeout(200)
def test_a_run_goes_on_from_its_checkpoint(given: Path, classifier: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(classifier, out)
    shutil.rmtree(out / "checkpoints" / "checkpoint-48")
    words = classification(given, out, *STEPS, "--save-every", 24, "--resume")
    again = alone(SCRIPT, *words, seconds=90)
    assert again.returncode == 0, again.stderr[-3000:]
    assert read_report(out)["steps"] == 48
    whole = [line["loss"] for line in read_metrics(classifier)]
    assert [line["loss"] for line in read_metrics(out)] == whole


@pytest.mark.timeout(300)
def test_two_processes(given: Path, classifier: Path, tmp_path: Path) -> None:
    ours, adamw = tmp_path / "ours", tmp_path / "adamw"
    micro = (*STEPS, "--micro-batch", 4)
    for out, launcher, options, more in (
        (ours, "forked", (), ()),
        (adamw, "accelerate", CPU, ("--optimizer", "adamw", "--precision", "bf16")),
    ):
        words = classification(given, out, *micro, *more)
        finished = launch(
            SCRIPT, *words, processes=2, seconds=90, launcher=launcher, options=options
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        report = read_report(out)
        assert (report["engine"], report["world_size"]) == ("DDP", 2)
        assert report["job"]["accumulation_steps"] == 2
        assert report["final_measure"] > 0.9
    for two, one in zip(read_metrics(ours), read_metrics(classifier), strict=True):
        LOSSES.check(two["loss"], one["loss"])
        assert two["tokens"] == one["tokens"]
    assert max(read_report(ours)["state_bytes"]) < max(read_report(adamw)["state_bytes"]) / 2
    assert read_report(adamw)["low_rank_adamw_bytes"] == 0
    assert read_report(adamw)["job"]["precision"] == "bf16"
    compared = compare(tmp_path, "ours", "adamw")
    assert "Matthews" in compared and "AdamW" in compared


@pytest.mark.timeout(200)
@pytest.mark.parametrize("engine", ["ZeRO-3", "FSDP2"])
def test_a_language_model_in_pieces(engine: str, given: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "run"
    words = ("--model", given / "llama", "--task", "causal-lm", "--train", given / "text.txt")
    job = (*words, *LEARN, *LOW_RANK, "--steps", 40, "--eval-every", 20, "--out", out)
    if engine == "FSDP2":
        options = ("--config_file", ROOT / "launchers/accelerate/fsdp2.yaml")
        finished = launch(
            ON_CPUS_TOO, SCRIPT, *job, processes=2, seconds=120, launcher="accelerate",
            options=options,
        )  # fmt: skip
    else:
        job = (*job, "--deepspeed", "ds_configs/zero3.json")
        finished = launch(SCRIPT, *job, processes=2, seconds=120)
    assert finished.returncode == 0, finished.stderr[-3000:]
    report, losses = read_report(out), [line["loss"] for line in read_metrics(out)]
    assert (report["engine"], report["optimizer"]) == (engine, "AdaRankGrad")
    assert report["world_size"] == 2
    assert report["measure"] == "held_out_loss"
    assert report["final_held_out_loss"] < 0.5 * losses[0]
    assert report["low_rank_state_bytes"] < report["low_rank_adamw_bytes"] / 2
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    logits = model(tokenizer("the a", return_tensors="pt")["input_ids"]).logits
    assert tokenizer.convert_ids_to_tokens(int(logits[0, -1].argmax())) == "film"


@pytest.mark.timeout(120)
def test_a_signal_leaves_a_report_and_a_checkpoint(given: Path, tmp_path: Path) -> None:
    options = classification(given, tmp_path, "--steps", 10_000, "--save-every", 10_000)
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *options],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "metrics.jsonl").exists() or len(read_metrics(tmp_path)) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=patient(30)) == 128 + signal.SIGTERM
    finally:
        process.kill()
    report = read_report(tmp_path)
    assert report["status"] == "interrupted"
    assert (tmp_path / "checkpoints" / f"checkpoint-{report['steps']}").is_dir()
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--set", "enrgy=0.5"), ["enrgy", "'energy'"]),
        (("--model", "nowhere"), ["--model nowhere"]),
        (("--out", "{earlier}"), ["--out", "checkpoints of an earlier run", "--resume"]),
        (("--max-length", 65), ["--max-length 65", "64 positions"]),
        (("--eval", "{odd}"), ["--eval", "odd.csv, line 3", "'so-so'", "bad, good"]),
        (("--out", os.devnull), ["--out", os.devnull]),
        (("--deepspeed", "ds_configs/zero2.json", "--precision", "bf16"), ["--precision", "JSON"]),
    ],
)
def test_bad_input_gets_one_line(
    options: tuple[Any, ...], words: list[str], given: Path, classifier: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd.csv"
    odd.write_text("text,label\nfine,good\nfine,so-so\n")
    names = {"odd": odd, "earlier": classifier}
    replaced = [str(word).format(**names) for word in options]
    run = classification(given, tmp_path / "run", "--steps", 2)
    finished = alone(SCRIPT, *run, *replaced, seconds=60, forked="--deepspeed" not in options)
    assert finished.returncode == 2
    lines = finished.stderr.strip().splitlines()
    assert len(lines) == 1, finished.stderr
    assert all(word in lines[0] for word in words), lines[0]
