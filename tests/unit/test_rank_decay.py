"""Ranks of gradients: what is measured, and that the command measures it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.rank_decay import ENERGY, look, main, ranks_of

pytestmark = pytest.mark.unit


@given(st.integers(1, 8), st.integers(0, 5), st.floats(1e-3, 1e3))
def test_equal_singular_values_count_alike_in_every_rank(rank: int, more: int, size: float) -> None:
    matrix = torch.zeros(rank + more, 9)
    matrix[:rank, :rank] = size * torch.eye(rank)
    found = ranks_of(matrix)
    assert (found.entropy, found.stable) == pytest.approx((rank, rank))
    assert found.directions in (int(ENERGY * rank), int(ENERGY * rank) + 1)


def test_a_zero_matrix_has_no_rank() -> None:
    assert ranks_of(torch.zeros(3, 4)) == (0, 0, 0)


def test_the_mean_of_batches_shows_what_noise_hides() -> None:
    """Gradients of rank one, and noise of forty times their energy."""
    random = torch.Generator().manual_seed(0)
    weight = torch.zeros(20, 30, requires_grad=True)
    gradient = torch.zeros(20, 30)
    gradient[0, 0] = 1.0
    noise = (40 / 600) ** 0.5

    def losses():
        for _ in range(4000):
            direction = gradient + noise * torch.randn(20, 30, generator=random)
            yield lambda direction=direction: (direction * weight).sum()

    found = look({"weight": weight}, losses())["weight"]
    assert list(found["batches"]) == [1, 8, 4000]
    assert found["batches"][1].stable > 5 and found["batches"][4000].stable < 1.1
    assert found["signal"] == pytest.approx(1 / 41, rel=0.1)


def test_one_matrix_ends_in_a_gradient_of_rank_one(tmp_path: Path, capsys) -> None:
    """The case of the paper's proof: gradient descent on one matrix, all examples in each step."""
    given = ["--width", "6", "--depth", "2", "--examples", "64", "--steps", "1500", "--points", "9"]
    assert main(["reversible", "--out", str(tmp_path), *given]) == 0
    run = json.loads((tmp_path / "reversible-one-matrix.ranks.json").read_text())
    stable = [point["matrices"]["0.weight"]["batches"]["1"]["stable"] for point in run["seen"]]
    assert max(stable) > 1.5 and stable[-1] < 1.01
    assert "reversible, one matrix" in capsys.readouterr().out
    assert (tmp_path / "ranks.png").stat().st_size > 10_000


def test_ranks_are_seen_while_a_model_is_trained(tmp_path: Path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 400)
    given = ["--data", str(text), "--model", "pico", "--steps", "2", "--warmup", "1"]
    given += ["--batch-size", "2", "--seq-len", "16", "--eval-every", "1", "--eval-sequences", "2"]
    out = tmp_path / "out"
    chosen = ["--methods", "adamw=1e-3,3e-3", "--batches", "9"]
    assert main(["pretrain", "--out", str(out), *given, *chosen]) == 0
    run = json.loads((out / "pretrain-adamw.ranks.json").read_text())
    assert [point["step"] for point in run["seen"]] == [0, 1, 2]
    for found in run["seen"][1]["matrices"].values():
        assert list(found["batches"]) == ["1", "8", "9"] and found["signal"] <= 1
    assert "| step | one batch | mean of 8 | mean of 9 | signal |" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["adamw"], ["adamw=fast"], ["adamw=1,2,3"], ["nothing=1"]])
def test_methods_without_rates_are_refused(words, tmp_path: Path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 400)
    given = ["--data", str(text), "--model", "pico", "--steps", "1", "--seq-len", "16"]
    assert main(["pretrain", "--out", str(tmp_path / "out"), *given, "--methods", *words]) == 2
    assert "--methods" in capsys.readouterr().err


def test_a_directory_without_runs_is_told(tmp_path: Path, capsys) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "contains no *.ranks.json" in capsys.readouterr().err
