"""What is counted of memory: exact peaks of tensors, what a process holds; tables of given ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from arg_dist.cli.parsing import InputError
from benchmarks import memory, scaling
from benchmarks.measuring import jobs, launching
from benchmarks.measuring.accounting import Holdings, PeakMemory, held_state
from benchmarks.measuring.allocations import peak_of_a_step
from benchmarks.measuring.contenders import NEVER, Matrices, step_of
from benchmarks.measuring.jobs import Jobs
from benchmarks.measuring.launching import JobError, run_job
from benchmarks.measuring.shapes import Place, Shape
from benchmarks.measuring.timing import Times

CPU = torch.device("cpu")
MIB = 2**20


def peak(prepare: Callable[[], Callable[[], object]]) -> int:
    return peak_of_a_step(prepare, device=CPU)


def test_a_peak_counts_what_lives_together_and_nothing_that_was_there() -> None:
    def prepare() -> Callable[[], None]:
        given = torch.zeros(1000)
        kept = [torch.zeros(700)]

        def step() -> None:
            first = given.clone()
            second = first.clone()
            del first
            third = second.clone()
            del second, third
            kept[0] = torch.zeros(700)  # the new one before the old one goes

        return step

    assert peak(prepare) == 4 * 2000


def test_a_peak_counts_what_an_operator_takes_for_itself() -> None:
    square = torch.randn(64, 64)
    assert peak(lambda: lambda: torch.linalg.qr(square)) > 2 * 4 * 64 * 64


def of_a_step(name: str, shape: Shape, gap: int, dtype: torch.dtype) -> int:
    place = Place(CPU, dtype)
    return peak(lambda: step_of(name, Matrices([shape], place), rank=8, gap=gap))


@pytest.mark.parametrize("gap", [NEVER, 1], ids=["steady", "new basis"])
@pytest.mark.parametrize("name", ["recommended", "matched", "no-residual"])
@pytest.mark.parametrize(("rows", "columns"), [(512, 256), (256, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_our_step_never_has_several_matrices_in_full_size(
    name: str, rows: int, columns: int, gap: int, dtype: torch.dtype
) -> None:
    one, four = (of_a_step(name, Shape(rows, columns, k), gap, dtype) for k in (1, 4))
    # of each further matrix the squared norms of rows, and some scalars
    assert four - one <= 3 * (4 * max(rows, columns) + 256)
    if dtype == torch.float32:
        # Newton-Schulz has X, the next X, and two square matrices of the shorter side
        polar = rows * columns + 2 * min(rows, columns) ** 2
        assert one < 1.5 * 4 * rows * columns + 4 * polar * (name == "recommended")


def test_weights_gradients_and_state_are_those_of_the_step() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))
    model[1].weight.data = torch.zeros(100)[:32].view(4, 8)  # and what it keeps alive
    optimizer = torch.optim.AdamW(model.parameters())
    holdings = Holdings(model, [optimizer])
    for _ in range(2):
        holdings.begin()
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert holdings.weights == 4 * (64 + 100)
    assert holdings.gradients == 4 * (64 + 32)
    assert held_state([optimizer]).logical == 4 * (2 * (64 + 32) + 2)


def test_the_peak_of_a_process_is_told_beyond_its_start() -> None:
    watched = PeakMemory(CPU)
    watched.begin()
    torch.ones(16 * MIB)
    found = watched.beyond
    assert found is not None
    assert 60 * MIB < found < 100 * MIB


JOBS = Jobs("60m", 128, CPU, 1, 100.0, batch=2, length=64, steps=3, tell=lambda _: None)


def process(state: int, rss: int | None, seconds: float = 0.25) -> dict[str, Any]:
    return {
        "peak": rss, "weights": 4 * MIB, "gradients": 2 * MIB,
        "state": {"logical": 1, "storage": state}, "seconds": [9.0, seconds, seconds],
    }  # fmt: skip


def measured(job: dict[str, Any], processes: int) -> list[dict[str, Any]]:
    """Figures as a job's processes would leave them: one of them has a quarter more."""
    if job["name"] == "galore" and job.get("engine") == "zero2":
        raise JobError("all of it", "IndexError: flat")
    if "engine" not in job:
        sizes = {"temporary": 2 * MIB, "temporary_with_new_bases": 3 * MIB, "peak": None}
        return [{"state": {"logical": MIB, "storage": MIB}, **sizes}]
    share = 12 * MIB // processes
    return [process(share if i else share * 5 // 4, 7 * MIB) for i in range(processes)]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(kind: str, job: dict[str, Any], *, processes: int, **_: Any) -> list[dict[str, Any]]:
        return measured(job, processes)

    monkeypatch.setattr(jobs, "run_job", run)


@pytest.mark.usefixtures("given")
def test_what_a_step_takes_alone() -> None:
    table = memory.measure_alone(JOBS, ["recommended"])
    rows = [["recommended", "1.00", "2.00", "3.00", "not measured"]]
    assert [list(row) for row in table.blocks[0].rows] == rows
    assert table.samples[0]["optimizer"] == "recommended"


@pytest.mark.usefixtures("given")
def test_what_a_process_has_under_each_engine_is_that_of_the_one_that_has_most() -> None:
    names = ["adamw", "galore"]
    table = memory.measure_engines(JOBS, ["none", "zero2"], names, processes=2)
    assert [block.heading for block in table.blocks] == ["none, 1 process", "zero2, 2 processes"]
    assert [list(row) for row in table.blocks[1].rows] == [
        ["adamw", "4.00", "2.00", "7.50", "7.00"],
        ["galore", "not possible", "", "", ""],
    ]
    assert "galore under zero2, not possible: IndexError: flat." in table.notes


@pytest.mark.usefixtures("given")
def test_state_by_the_number_of_processes_is_held_against_the_fewest() -> None:
    table = scaling.measure_processes(JOBS, ["ddp"], ["adamw"], processes=[4, 1, 2], cores=2)
    assert [list(row) for row in table.blocks[0].rows] == [
        ["1 process", "15.00", "1.000", "250"],
        ["2 processes", "7.50", "1.000", "250"],
        ["4 processes", "3.75", "1.000", "not measured"],
    ]
    assert any("more processes than cores (2)" in note for note in table.notes)


def test_what_of_ours_fails_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise JobError("its last lines", "ValueError: ours")

    monkeypatch.setattr(jobs, "run_job", fail)
    for name, reason in (("recommended", "raises"), ("galore", "tells")):
        if reason == "raises":
            with pytest.raises(InputError, match="its last lines"):
                JOBS.train("ddp", name, 2)
        else:
            assert JOBS.train("ddp", name, 2)["reason"] == "ValueError: ours"


def test_a_line_through_times_of_layers() -> None:
    slope, ratios = scaling.fit([2, 4, 8], [3.0, 5.0, 9.0])
    assert slope == pytest.approx(1.0)
    assert ratios == pytest.approx([1.0, 1.0, 1.0])
    seconds = {str(n): Times((n * 0.001,)).as_json() for n in (2, 4, 8)}
    sample = {
        "optimizer": "adamw", "model": "60m", "rank": 8, "device": "cpu", "layers": [2, 4, 8],
        "seconds": seconds, "not_possible": {},
    }  # fmt: skip
    broken = {**sample, "optimizer": "fira", "not_possible": {"fira": "RuntimeError: no"}}
    table = scaling.layer_figures([sample, broken], rounds=1)
    assert table.blocks[0].heading == "adamw: 1.00 ms per layer, fit within 0.0 %"
    assert list(table.blocks[0].rows[2]) == ["8 layers", "8.00 (8.00..8.00)", "1.00", "+0.0 %"]
    assert table.blocks[1].rows[0][1] == "not possible"
    assert sample["largest_deviation"] == pytest.approx(0.0)


def test_each_process_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    memory.check_devices(CPU, 4)
    with pytest.raises(InputError, match=r"--processes 2: .* found 1; use --device cpu"):
        memory.check_devices(torch.device("cuda"), 2)


@pytest.mark.parametrize(
    ("program", "limit", "told", "reason"),
    [
        ("import sys; print('its word'); sys.exit(3)", 60.0, "exited with 3:\nits word", None),
        ("import time; time.sleep(60)", 0.5, "not finished after 0.5 s", None),
    ],
)
def test_a_job_that_fails_or_hangs_is_told_with_its_last_lines(
    program: str, limit: float, told: str, reason: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def words(folder: Path, processes: int) -> list[str]:
        return [launching.sys.executable, "-c", program]

    monkeypatch.setattr(launching, "_words", words)
    with pytest.raises(JobError) as failed:
        run_job("training", {"device": "cpu"}, processes=2, threads=1, limit=limit)
    assert told in str(failed.value)
    assert failed.value.reason == reason
