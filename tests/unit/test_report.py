"""The record of a run: files, summary, tables, pictures, comparison."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from arg_dist.config import in_bytes
from arg_dist.telemetry import Numbers, merge
from launchers.reporting import Earlier, OptimizerSample, RunRecord, run_facts, sample_optimizer
from launchers.reporting.__main__ import main
from launchers.reporting.charts import kind_of
from launchers.reporting.files import read_metrics, read_report
from launchers.reporting.tables import print_summary

pytestmark = pytest.mark.unit

PNG = b"\x89PNG\r\n\x1a\n"

SAMPLE = OptimizerSample(
    ranks={"layers.0.q_proj.weight": 8, "layers.0.up_proj.weight": 16},
    energy={"layers.0.q_proj.weight": 0.9, "layers.0.up_proj.weight": 0.95},
    state_bytes=[250, 300],
    adamw_bytes=[1000, 1000],
    sent_bytes=[40, 80],
    collectives=160,
    low_rank_bytes=150,
    low_rank_adamw_bytes=1200,
)


def facts(**changes):
    known = {
        "engine": "ZeRO-2", "world_size": 2, "model": "nano", "model_parameters": 2_800_000,
        "optimizer": "AdaRankGrad", "optimizer_settings": {"lr": 1e-3}, "batch_size": 16,
    }  # fmt: skip
    return run_facts(**(known | changes))


def step(number: int, **more):
    line = {"step": number, "loss": 5 / number, "lr": 1e-3, "seconds": 0.5, "tokens": 10 * number}
    return line | more


def write_run(directory, *, sample=SAMPLE, steps=40, status="finished", **changes):
    with RunRecord(directory, facts(**changes), planned_steps=steps, active=True) as record:
        for number in range(1, steps + 1):
            more = {"held_out_loss": 6 / number} if number % 10 == 0 else {}
            record.step(step(number, **more), sample if number % 5 == 0 else None)
        record.finish(status)


def test_a_run_leaves_its_three_files(tmp_path, capsys):
    write_run(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "metrics.jsonl", "report.json", "report.png",
    ]  # fmt: skip
    assert (tmp_path / "run" / "report.png").read_bytes().startswith(PNG)
    steps = read_metrics(tmp_path / "run")
    assert len(steps) == 40
    assert steps[4]["ranks"] == SAMPLE.ranks
    assert "ranks" not in steps[5]
    report = read_report(tmp_path / "run")
    assert report["status"] == "finished"
    assert report["tokens"] == 400
    assert report["best_held_out_loss"] == report["final_held_out_loss"] == 0.15
    assert report["mean_rank"] == 12
    assert report["largest_share"] == 0.3
    assert (report["low_rank_state_bytes"], report["low_rank_adamw_bytes"]) == (150, 1200)
    assert report["sent_bytes_per_step"] == [1, 2]
    assert report["collectives_per_step"] == 4
    assert report["seconds_per_step"] == 0.5
    assert report["versions"]["torch"] == torch.__version__
    assert report["job"] == {"batch_size": 16}
    printed = capsys.readouterr().out
    assert "largest share of AdamW's state" in printed
    assert "optimizer collectives per step" in printed


def test_a_run_without_low_rank_matrices_or_evaluations_has_a_report_too(tmp_path):
    with RunRecord(tmp_path, facts(), planned_steps=5, active=True) as record:
        record.step(step(1), OptimizerSample(state_bytes=[8], adamw_bytes=[8], sent_bytes=[0]))
        record.finish("interrupted")
    report = read_report(tmp_path)
    assert (report["status"], report["steps"], report["planned_steps"]) == ("interrupted", 1, 5)
    assert report["mean_rank"] is None
    assert report["final_held_out_loss"] is None


def test_a_resumed_run_keeps_the_lines_before_its_checkpoint(tmp_path):
    write_run(tmp_path, steps=40)
    earlier = Earlier(30)
    with RunRecord(tmp_path, facts(), planned_steps=40, active=True, earlier=earlier) as record:
        assert not (tmp_path / "report.json").exists()
        for number in range(31, 41):
            record.step(step(number, seconds=1.5), SAMPLE if number == 40 else None)
        record.finish("finished")
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 41))
    assert [line["seconds"] for line in read_metrics(tmp_path)[29:31]] == [0.5, 1.5]
    assert read_report(tmp_path)["sent_bytes_per_step"] == [4, 8]  # of the ten steps of its own


def test_a_run_goes_on_from_what_its_checkpoint_knows(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    with RunRecord(first, facts(), planned_steps=6, active=True) as record:
        for number in (1, 2, 3):
            record.step(step(number))
        line = step(3)
        known = record.progress(line)
        line["save_seconds"] = 1.0  # while a thread writes what is known
        assert known["last_line"] == step(3)
        # killed before it could write the line of the checkpoint's step
        known = json.loads(json.dumps(record.progress(step(4), SAMPLE)))
    earlier = Earlier(4, first, **known)
    changed = facts(engine="FSDP2", world_size=3)
    with RunRecord(second, changed, planned_steps=6, active=True, earlier=earlier) as record:
        assert [line["step"] for line in read_metrics(second)] == [1, 2, 3, 4]
        record.step(step(5, save_seconds=0.25))
        again = Earlier(5, second, **record.progress(step(5)))
        record.step(step(6, save_seconds=0.75), SAMPLE)
        saves = [
            {"step": 5, "stall_seconds": 0.25, "write_seconds": 1.5, "bytes": 2**20},
            {"step": 6, "stall_seconds": 0.75, "write_seconds": 2.5, "bytes": 3 * 2**20},
        ]
        record.finish("finished", saves)
    assert read_metrics(second)[3]["ranks"] == SAMPLE.ranks
    report = read_report(second)
    assert [(part["first_step"], part["engine"]) for part in report["parts"]] == [
        (1, "ZeRO-2"), (5, "FSDP2"),
    ]  # fmt: skip
    assert report["saves"] == saves
    assert report["seconds"] >= known["seconds"]
    assert report["sent_bytes_per_step"] == [20, 40]  # over the two steps of this part
    printed = capsys.readouterr().out
    assert "stall 0.500 s, write 2.000 s, 2.0 MiB" in printed
    assert "resumed after step" in printed
    # lines of the checkpoint's step, and of none after it, come back once
    assert [line["step"] for line in again.lines(tmp_path / "third")] == [1, 2, 3, 4, 5]


def test_the_earlier_lines_are_in_the_file_at_every_moment(tmp_path, monkeypatch):
    write_run(tmp_path, steps=4)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        RunRecord(tmp_path, facts(), planned_steps=4, active=True, earlier=Earlier(2))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_run_is_judged_by_its_measure(tmp_path, capsys):
    for name, scale in (("ours", 1.0), ("theirs", 0.5)):
        known = facts(measure="matthews")
        with RunRecord(tmp_path / name, known, planned_steps=3, active=True) as record:
            for number, correlation in enumerate((0.1, 0.5, 0.4), start=1):
                held_out = {"held_out_loss": 0.6 + number, "matthews": scale * correlation}
                record.step(step(number, accuracy=0.75, **held_out), SAMPLE)
            record.finish("finished")
    report = read_report(tmp_path / "ours")
    assert (report["final_measure"], report["best_measure"]) == (0.4, 0.5)
    assert report["final_measures"] == {"matthews": 0.4, "accuracy": 0.75, "held_out_loss": 3.6}
    assert report["best_held_out_loss"] == 1.6
    assert "best Matthews correlation" in capsys.readouterr().out
    runs = [str(tmp_path / name) for name in ("ours", "theirs")]
    assert main(["compare", *runs, "--out", str(tmp_path / "compare.png")]) == 0
    compared = capsys.readouterr().out
    assert "Matthews correlation" in compared
    assert "0.4000" in compared and "0.2000" in compared
    write_run(tmp_path / "language")  # judged by its loss, which is all that the two have in common
    runs[1] = str(tmp_path / "language")
    capsys.readouterr()
    assert main(["compare", *runs, "--out", str(tmp_path / "compare.png")]) == 0
    compared = capsys.readouterr().out
    assert "held-out loss" in compared
    assert "3.6000" in compared and "0.1500" in compared


def test_an_error_leaves_a_report_that_says_so(tmp_path):
    def unlucky_run():
        with RunRecord(tmp_path, facts(), planned_steps=5, active=True) as record:
            record.step(step(1, loss=math.nan))
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        unlucky_run()
    assert read_report(tmp_path)["status"] == "failed"
    assert read_metrics(tmp_path)[0]["loss"] is None  # JSON has no NaN


def test_other_processes_write_nothing(tmp_path):
    write_inactive = RunRecord(tmp_path / "run", facts(), planned_steps=1, active=False)
    with write_inactive as record:
        record.step(step(1))
        record.finish("finished")
    assert not (tmp_path / "run").exists()


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    whole = json.dumps(step(1))
    (tmp_path / "metrics.jsonl").write_text(whole + "\n" + whole[:20])
    assert read_metrics(tmp_path) == [step(1)]
    (tmp_path / "metrics.jsonl").write_text(whole[:20] + "\n" + whole)
    with pytest.raises(ValueError, match="Expecting"):
        read_metrics(tmp_path)


def test_a_cut_matrix_counts_once_and_bytes_go_by_process():
    whole = {"name": "a", "rank": 4, "energy": 0.9, "shape": (10, 20), "state_bytes": 8}
    cut = {"name": "b", "rank": 8, "energy": 0.8, "shape": (5, 10), "state_bytes": 4}
    unborn = {"name": "c", "rank": 0, "energy": 0.0, "shape": (2, 5), "state_bytes": 0}
    sample = merge([Numbers([whole, cut], 10, 100, 1, 3), Numbers([cut, unborn], 20, 100, 2, 4)])
    assert sample.ranks == {"a": 4, "b": 8}
    assert sample.energy == {"a": 0.9, "b": 0.8}
    assert sample.state_bytes == [10, 20]
    assert sample.sent_bytes == [1, 2]
    assert sample.collectives == 4
    assert sample.largest_share == 0.2
    assert sample.mean_rank == 6
    assert sample.low_rank_bytes == 8 + 4 + 4
    assert sample.low_rank_adamw_bytes == 8 * (10 * 20 + 5 * 10 + 2 * 5)


def test_the_state_of_adamw_is_its_two_moments():
    weight = torch.nn.Parameter(torch.ones(10, 10))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    sample = sample_optimizer(optimizer)
    assert sample.state_bytes == sample.adamw_bytes == [800]
    assert sample.ranks == {}


def test_runs_are_compared_side_by_side(tmp_path, capsys):
    adamw = OptimizerSample(state_bytes=[1000, 1000], adamw_bytes=[1000, 1000], sent_bytes=[0, 0])
    write_run(tmp_path / "ours")
    write_run(tmp_path / "theirs", sample=adamw, optimizer="AdamW")
    capsys.readouterr()
    runs = [str(tmp_path / "ours"), str(tmp_path / "theirs")]
    assert main(["compare", *runs, "--out", str(tmp_path / "compare.png")]) == 0
    printed = capsys.readouterr().out
    assert "ours" in printed
    assert "theirs" in printed
    assert (tmp_path / "compare.png").read_bytes().startswith(PNG)


def test_comparing_what_is_no_run_is_told_in_one_line(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "nothing")]) == 2
    told = capsys.readouterr().err
    assert "nothing: not the directory of a finished run" in told
    assert told.count("\n") == 1


def test_the_table_is_narrow_enough_for_a_terminal(tmp_path):
    write_run(tmp_path)
    output = io.StringIO()
    print_summary(read_report(tmp_path), "runs/nano/report.json", Console(file=output, width=80))
    assert max(map(len, output.getvalue().splitlines())) <= 80


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**40, "3.0 TiB")]
)
def test_sizes_are_written_for_people(number, text):
    assert in_bytes(number) == text


def test_a_matrix_is_named_by_its_kind():
    assert kind_of("model.layers.3.self_attn.q_proj.weight") == "q_proj"
    assert kind_of("experts") == "experts"


def test_values_of_other_libraries_do_not_end_a_run(tmp_path):
    settings = {"lr": np.float32(0.5), "betas": np.array([0.5, 0.75]), "dtype": torch.bfloat16}
    with RunRecord(
        tmp_path, facts(optimizer_settings=settings), planned_steps=1, active=True
    ) as run:
        run.step(step(1, held_out_loss=np.float32(2), best=torch.tensor(math.inf), data=Path("a")))
        run.finish("finished")
    [line] = read_metrics(tmp_path)
    assert (line["held_out_loss"], line["best"], line["data"]) == (2.0, None, "a")
    written = {"lr": 0.5, "betas": [0.5, 0.75], "dtype": "torch.bfloat16"}
    assert read_report(tmp_path)["optimizer_settings"] == written
