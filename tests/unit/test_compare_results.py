"""What a reader of a comparison gets: rows, table, pictures, out of runs made by hand."""

import io
import json

import pytest
from rich.console import Console

from arg_dist.cli.parsing import InputError
from benchmarks.compare.methods import Method
from benchmarks.compare.outcome import write_outcome
from benchmarks.compare.pictures import (
    CURVES,
    FRONTIER,
    PROGRESS,
    RANKS,
    label,
    layer_of,
    mean_rank_at,
)
from benchmarks.compare.records import Records, Trial
from benchmarks.compare.results import Tried, rows_of
from benchmarks.compare.tables import markdown
from launchers.reporting.measures import LOSS, MEASURES

MATRIX = "model.layers.3.mlp.up_proj.weight"
RANKS_OF_A_RUN = {MATRIX: [[1, 8, 0.9], [30, 4, 0.9]], "model.layers.0.q.weight": [[10, 6, 0.9]]}


def results(final: float | None, *, bytes_kept: int = 250, ranks=None, mean=None):
    peak = {"logical": bytes_kept, "storage": 2 * bytes_kept}
    return {
        "status": "finished",
        "error": None,
        "measure": LOSS,
        "final": final,
        "steps": 40,
        "curve": [[20, 2000, final + 1], [40, 4000, final]],
        "state": {
            "matrices": {"peak": peak, "end": peak, "adamw": 1000},
            "all": {"peak": peak, "end": peak, "adamw": 3000},
        },
        "seconds": {"step": 0.5, "step_cpu": 0.25, "optimizer": 0.1, "optimizer_mean": 0.125},
        "ranks": ranks or {},
        "mean_rank": mean,
        "final_rank": mean,
        "flap": None if mean is None else 0.05,
        "progress": [
            {"step": step, "seconds": step / 4, "state": bytes_kept, "rank": mean}
            for step in (20, 40)
        ],
        "hardware": {"cpu": "a processor"},
    }


@pytest.fixture
def comparison(tmp_path):
    """Two methods with three rates and several seeds, one of them with rates of the rest, and one
    that diverged."""
    records = Records(tmp_path)
    methods = [Method(name, "adamw", {}) for name in ("adamw", "ours", "lost")]
    with records.locked():
        records.begin({"steps": 40}, methods, sweep_seed=0, command="the command")
    for rate, final in ((0.1, 3.0), (0.2, 2.0), (0.4, 2.5)):
        records.add(Trial("adamw", rate, rate, 0), results(final, bytes_kept=1000))
        ranked = {"ranks": RANKS_OF_A_RUN, "mean": 5.5}
        records.add(Trial("ours", rate, 0.3, 0), results(4 - 5 * rate, **ranked))
    records.add(Trial("ours", 0.4, 0.6, 0), results(2.25, **ranked))
    records.add(Trial("adamw", 0.2, 0.2, 1), results(2.2, bytes_kept=1100))
    records.add(Trial("adamw", 0.2, 0.2, 2), results(2.1))
    records.add(Trial("ours", 0.4, 0.3, 1), results(2.5, ranks=RANKS_OF_A_RUN, mean=6.5))
    why = {"status": "diverged", "final": None, "error": "step 2: the loss is nan", "measure": LOSS}
    records.add(Trial("lost", 0.2, 0.2, 0), why)
    return tmp_path


def test_a_row_has_the_sweep_and_the_seeds_of_the_best_rate(comparison):
    records = Records(comparison)
    adamw, ours, lost = rows_of(records.comparison(), records.runs())
    assert adamw.swept == [Tried(0.1, 0.1, 3.0), Tried(0.2, 0.2, 2.0), Tried(0.4, 0.4, 2.5)]
    assert not adamw.two_rates and ours.two_rates
    assert ours.swept[-2:] == [Tried(0.4, 0.3, 2.0), Tried(0.4, 0.6, 2.25)]
    assert (adamw.lr, adamw.edge, adamw.by_seed) == (0.2, False, {0: 2.0, 1: 2.2, 2: 2.1})
    assert (adamw.median, adamw.spread) == (2.1, pytest.approx(0.2))
    # the most of any seed at the best rate
    assert adamw.matrices == {"logical": 1100, "storage": 2200}
    assert (adamw.share("logical"), adamw.share("storage")) == (1.1, 2.2)
    assert (ours.lr, ours.edge, ours.mean_rank, ours.flap) == (0.4, True, 6.0, 0.05)
    assert (ours.rest_lr, ours.rest_edge, adamw.rest_edge) == (0.3, True, False)
    assert (lost.lr, lost.median, lost.lost) == (
        None, None, ("0.2, seed 0: diverged, step 2: the loss is nan",)
    )  # fmt: skip


def test_a_seed_without_a_result_leaves_no_median(comparison):
    records = Records(comparison)
    records.add(Trial("ours", 0.4, 0.3, 2), {"status": "failed", "final": None, "error": "SIGKILL"})
    ours = rows_of(records.comparison(), records.runs())[1]
    assert ours.by_seed == {0: 2.0, 1: 2.5, 2: None}
    assert ours.median is None and ours.spread is None


def test_the_table_shows_that_the_sweeps_were_alike(comparison):
    records = Records(comparison)
    text = markdown(rows_of(records.comparison(), records.runs()), MEASURES[LOSS])
    lines = text.splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    adamw, ours, lost = (next(x for x in lines if x.startswith(f"| {n} ")) for n in NAMES)
    assert (
        "0.1: 3.0000, 0.2: 2.0000, 0.4: 2.5000 | 0.2 | - | 2.0000 2.2000 2.1000 | 2.1000" in adamw
    )
    assert "| 110.0 % | 220.0 % |" in adamw
    tried = "at rest 0.3 0.1: 3.5000, 0.2: 3.0000, 0.4: 2.0000; at rest 0.6 0.4: 2.2500"
    assert f"| {tried} | 0.4 (edge) | 0.3 (edge) |" in ours
    assert "0.4 (edge)" in ours and "6.0, end 6.0 | 5.0 %" in ours
    assert lost.startswith("| lost | 0.2: - | - | - | - | - |")
    assert "The sweeps differ in size: adamw 3, ours 4, lost 1 pairs of learning rates." in text
    assert "lost at 0.2, seed 0: diverged, step 2: the loss is nan" in text


NAMES = ("adamw", "ours", "lost")


def test_the_files_are_written_and_the_terminal_needs_80_columns(comparison):
    screen = io.StringIO()
    write_outcome(comparison, Console(file=screen, width=80))
    printed = screen.getvalue()
    assert "0.4 (edge)" in printed and "0.3 (edge)" in printed and "…" not in printed
    *told, written = printed.splitlines()
    assert max(map(len, told)) <= 80 and written.startswith("wrote to")
    for name in (CURVES, FRONTIER, RANKS, PROGRESS):
        assert (comparison / name).read_bytes().startswith(b"\x89PNG")
    found = json.loads((comparison / "results.json").read_text())
    assert found["commands"] == ["the command"]
    assert found["rows"][0]["share"] == {"logical": 1.1, "storage": 2.2}
    assert found["rows"][1]["swept"][0] == {"lr": 0.1, "rest_lr": 0.3, "final": 3.5}
    assert (found["rows"][1]["lr"], found["rows"][1]["rest_lr"]) == (0.4, 0.3)
    assert found["hardware"] == [{"cpu": "a processor"}]
    assert (comparison / "table.md").read_text().startswith("| method |")


def test_a_comparison_without_any_result_has_a_table_and_no_pictures(tmp_path):
    records = Records(tmp_path)
    with records.locked():
        records.begin({}, [Method("a", "adamw", {})], sweep_seed=0, command="x")
    with pytest.raises(InputError, match="contains no comparison runs"):
        write_outcome(tmp_path)
    records.add(Trial("a", 0.1, 0.1, 0), {"status": "failed", "final": None, "error": "SIGKILL"})
    write_outcome(tmp_path, Console(file=io.StringIO()))
    assert not list(tmp_path.glob("*.png"))


def test_labels_name_both_rates_where_there_are_two(comparison):
    records = Records(comparison)
    adamw, ours, _ = rows_of(records.comparison(), records.runs())
    assert (label(adamw), label(ours)) == ("adamw, lr 0.2", "ours, lr 0.4, rest 0.3")


def test_ranks_are_told_by_layer_and_step():
    assert [layer_of(name) for name in (*RANKS_OF_A_RUN, "embed.weight")] == [3, 0, 0]
    assert [mean_rank_at(RANKS_OF_A_RUN, step) for step in (0, 1, 10, 30)] == [None, 8, 7, 5]
