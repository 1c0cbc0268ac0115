"""What the benchmarks make of given times: medians, quartiles, ratios, tables; what they refuse."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import memory, refresh, step
from benchmarks.measuring.contenders import NAMES, OURS, steps_that_work
from benchmarks.measuring.floor import copy_seconds_per_byte, moved_bytes, two_products
from benchmarks.measuring.results import Block, Figures, command, number, with_spread, write
from benchmarks.measuring.shapes import Place, Shape, cases, copies, layer_shapes, left_out
from benchmarks.measuring.timing import Spread, Times, in_turns

CPU = Place(torch.device("cpu"), torch.float32)


def rounds(*milliseconds: float) -> dict[str, Any]:
    return Times(tuple(each / 1000 for each in milliseconds)).as_json()


def test_a_spread_is_the_median_between_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert Spread(3.0, 2.0, 4.0).times(2) == Spread(6.0, 4.0, 8.0)


def test_ratios_and_differences_are_those_of_a_round() -> None:
    a, b = Times((2.0, 40.0, 6.0)), Times((1.0, 10.0, 2.0))
    assert a.over(b) == Spread.of([2.0, 4.0, 3.0])
    assert a.less(b) == Spread.of([1.0, 30.0, 4.0])
    assert a.as_json() == {"median": 6.0, "quartiles": [4.0, 23.0], "rounds": (2.0, 40.0, 6.0)}


def test_every_function_is_called_in_every_round_and_none_is_always_the_first() -> None:
    called: list[str] = []
    times = in_turns({name: lambda n=name: called.append(n) for name in "abc"}, rounds=3)
    assert all(len(times[name].seconds) == 3 for name in "abc")
    warm_up, timed = called[:6], called[6:]
    assert sorted(warm_up) == list("aabbcc")
    assert "".join(timed) == "abc" + "bca" + "cab"


def test_shapes_are_those_of_the_model_and_fill_the_cache() -> None:
    assert layer_shapes("350m") == [
        Shape(1024, 1024, 96), Shape(2736, 1024, 48), Shape(1024, 2736, 24)
    ]  # fmt: skip
    assert layer_shapes("60m", layers=2)[1] == Shape(1376, 512, 4)
    assert copies(Shape(1024, 1024, 96), 4) == 16
    assert copies(Shape(4096, 11008, 32), 4) == 1
    assert copies(Shape(128, 128, 16), 4) == 16


def test_a_rank_that_one_model_has_is_left_out_of_the_others() -> None:
    found = list(cases(["60m", "1b"], [128, 512]))
    assert [(case.model, case.rank) for case in found[::3]] == [
        ("60m", 128), ("1b", 128), ("1b", 512)
    ]  # fmt: skip
    assert [note[:21] for note in left_out(["60m", "1b"], [128, 512])] == ["60m: rank 512 omitted"]


@pytest.mark.parametrize("shape", [Shape(6, 4, 1), Shape(4, 6, 1)])
def test_the_floor_is_run_on_both_sides(shape: Shape) -> None:
    two_products(shape, 2, 3, CPU)()
    assert moved_bytes(shape, 3, torch.bfloat16) == 3 * 24 * 3 * 2
    assert 0 < copy_seconds_per_byte(CPU.device, size=2**16) < 1e-3


STEP = {
    "model": "60m", "shape": [512, 512], "in_the_model": 32, "timed_together": 2, "rank": 128,
    "dtype": "bf16", "device": "cpu", "optimizers": ["recommended", "adamw", "galore"],
    "traffic_seconds": None, "not_possible": {"galore": "RuntimeError: not in bf16"},
    "seconds": {
        "two products": rounds(2, 2, 2), "recommended": rounds(3, 4, 5), "adamw": rounds(6, 6, 6)
    },
}  # fmt: skip


def test_a_step_is_held_against_the_products_on_cpus() -> None:
    table = step.figures([STEP], ["no rank"], rounds=3)
    assert table.columns[1:] == ["ms per matrix", "vs. floor", "vs. recommended"]
    assert table.blocks == [
        Block(
            "60m: 32 of 512 x 512, rank 128, bf16",
            [
                ["two products", "1.00 (1.00..1.00)", "", ""],
                ["memory traffic", "not measured", "", ""],
                ["recommended", "2.00 (1.75..2.25)", "2.00 (1.75..2.25)", "1.00"],
                ["adamw", "3.00 (3.00..3.00)", "3.00 (3.00..3.00)", "1.50"],
                ["galore", "not possible", "", ""],
            ],
        )
    ]
    assert "no rank" in table.notes
    assert "galore, bf16 on cpu, not possible: RuntimeError: not in bf16." in table.notes
    assert any("GPU: not measured" in note for note in table.notes)


def test_a_step_is_held_against_the_traffic_on_gpus() -> None:
    sample = {**STEP, "device": "cuda", "traffic_seconds": 0.002, "optimizers": ["adamw"]}
    table = step.figures([sample], [], rounds=3)
    assert [list(row) for row in table.blocks[0].rows] == [
        ["two products", "1.00 (1.00..1.00)", ""],
        ["memory traffic", "1.00", ""],
        ["adamw", "3.00 (3.00..3.00)", "3.00 (3.00..3.00)"],
    ]
    assert not any("not measured" in note for note in table.notes)


def test_a_new_basis_is_what_a_step_takes_with_it_less_what_it_takes_without() -> None:
    sample = {
        "model": "60m", "shape": [512, 512], "rank": 128, "device": "cpu", "not_possible": {},
        "optimizers": ["recommended", "galore"],
        "seconds": {
            "recommended": rounds(1, 1, 1), "recommended, new basis": rounds(3, 2, 4),
            "galore": rounds(5, 5, 5), "galore, new basis": rounds(45, 45, 45),
        },
    }  # fmt: skip
    table = refresh.figures([sample], [], rounds=3)
    assert [list(row) for row in table.blocks[0].rows] == [
        ["recommended", "2.00 (1.50..2.50)", "1.00", "1.0 %"],
        ["galore", "40.0 (40.0..40.0)", "20.0", "4.0 %"],
    ]


def test_what_others_cannot_do_is_told_and_what_we_cannot_do_is_raised() -> None:
    def broken() -> None:
        raise NotImplementedError("no such kernel\nsecond line")

    done: list[int] = []
    steps, refused = steps_that_work(
        {"adamw": lambda: lambda: done.append(1), "galore": lambda: broken}
    )
    assert list(steps) == ["adamw"] and done == [1]
    assert refused == {"galore": "NotImplementedError: no such kernel"}
    with pytest.raises(NotImplementedError):
        steps_that_work({next(iter(OURS)): lambda: broken})


def test_a_table_fits_a_terminal_of_100_columns_and_loses_no_number() -> None:
    name, cell = max(NAMES, key=len), with_spread(Spread(1234.5, 1200, 9999))
    heading = "350m: 96 of 11008 x 4096, rank 512, bf16 and more of such words"
    table = Figures(
        "T", ["", "ms per matrix", "vs. floor", "vs. recommended"],
        [Block(heading, [[name, cell, cell, "0.82"]])], ["[note]"],
    )  # fmt: skip
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    table.show(console)
    printed = console.export_text()
    assert max(map(len, printed.splitlines())) <= 100
    assert printed.count(cell) == 2 and "0.82" in printed and "[note]" in printed
    for word in (*heading.split(), name):
        assert word in printed
    lines = table.markdown().splitlines()
    assert lines[2:6] == [
        "|  | ms per matrix | vs. floor | vs. recommended |", "| --- | ---: | ---: | ---: |",
        f"| **{heading}** |  |  |  |", f"| {name} | {cell} | {cell} | 0.82 |",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0004, "0.00"), (1.236, "1.24"), (9.999, "10.0"), (99.97, "100"), (-12.34, "-12.3")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_files_have_every_number_and_where_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/step.py", "--models", "60m"])
    seconds = {**STEP["seconds"], "recommended": rounds(125, 250, 500)}
    write([step.figures([{**STEP, "seconds": seconds}], [], rounds=3)], tmp_path / "step.json")
    found = json.loads((tmp_path / "step.json").read_text())
    assert found["command"] == "python -m benchmarks.step --models 60m"
    assert {"hardware", "versions", "commit", "date", "threads"} < set(found)
    assert found["tables"][0]["samples"][0]["seconds"]["recommended"] == {
        "median": 0.25, "quartiles": [0.1875, 0.375], "rounds": [0.125, 0.25, 0.5]
    }  # fmt: skip
    assert "| adamw | 3.00 (3.00..3.00) |" in (tmp_path / "step.md").read_text()


@pytest.mark.parametrize(
    ("started", "module"),
    [("benchmarks/step.py", "benchmarks.step"), ("benchmarks/gpu/__main__.py", "benchmarks.gpu")],
)
def test_the_command_of_a_run_can_be_typed_again(
    started: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started, "--out", "a b.json"])
    assert command() == f"python -m {module} --out 'a b.json'"


MAINS = {"step": step.main, "refresh": refresh.main, "memory": memory.main}


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        (
            "step",
            "--models 60m 350m --ranks 128 1024",
            "--ranks 1024: must be below .* 1024; use at most 1023",
        ),
        ("step", "--device nowhere", "--device nowhere: not available; choose from .*cpu"),
        ("refresh", "--methods adamw", "--methods: invalid choice: 'adamw'"),
        ("step", "--out table.md", "--out table.md: expected a file name ending in .json"),
        (
            "memory",
            "--rank 128 --seq-len 64",
            "--seq-len 64, --batch-size 1: 64 .* rank 64, but --rank is 128",
        ),
        ("step", "--rounds 0", "--rounds: expected an integer of at least 1"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(
    name: str, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = MAINS[name](words.split())
    except SystemExit as ended:
        code = ended.code
    told = capsys.readouterr().err
    assert code == 2
    assert len(told.splitlines()) == 1 and re.search(message, told), told
