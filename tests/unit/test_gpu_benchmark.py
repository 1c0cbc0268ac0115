"""The benchmark for a day with a GPU: every section runs here in tiny sizes, within its time."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arg_dist import subspace
from arg_dist.subspace.products import plain_apply, plain_project
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import ceilings, child, clock, launches, lists, messages, parity, peer, steps
from benchmarks.gpu.llama import ADAMW, RULES
from benchmarks.gpu.peer import CHECKS
from benchmarks.gpu.plan import LIMIT, SECTIONS
from benchmarks.gpu.sections import FULL, SMALL, Outcome, Section, Setting, figures_of
from benchmarks.measuring.results import Block, Figures

CPU = torch.device("cpu")
HERE = Setting(CPU, SMALL)
MINUTES = 9

Samples = list[dict[str, Any]]


# -- all of it on a CPU ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What a dry run leaves, as JSON and as Markdown; nothing is sent to another process."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    given = ["--device", "cpu", "--small", "--in-process", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(messages, "PROCESSES", (1,))
        patched.setattr(messages, "run_peers", alone)
        assert gpu.main(given) == 0
    return json.loads(out.read_text()), out.with_suffix(".md").read_text()


def alone(device: torch.device, count: int, seconds: float) -> dict[str, Any]:
    """A job of one process, which is this one; ``tests/launch/test_bench.py`` starts others."""
    with tempfile.TemporaryDirectory() as folder:
        code = peer.main(folder, str(device), str(count), "0")
        report = json.loads(Path(folder, "process-0.json").read_text())
    about = {"processes": count, "backend": "gloo", "exit_codes": [code], "logs": []}
    return {**about, "reports": [report]}


def samples_of(written: tuple[dict[str, Any], str], section: str) -> Samples:
    (table,) = (each for each in written[0]["tables"] if each["section"] == section)
    assert table["status"] == "finished", table
    found: Samples = table["samples"]
    assert found
    return found


def medians(sample: dict[str, Any]) -> list[float]:
    return [taken["median"] for taken in sample["seconds"].values()]


def test_the_files_have_every_section_and_where_it_was_measured(written) -> None:
    whole, text = written
    assert {"command", "commit", "date", "hardware", "versions"} < set(whole)
    assert [table["section"] for table in whole["tables"]] == list(SECTIONS)
    for section in SECTIONS.values():
        assert f"**{section.title}**" in text and samples_of(written, section.name)


def test_a_cpu_equals_itself_whatever_the_job_allows(written) -> None:
    samples = samples_of(written, "parity")
    assert len(samples) == 2 * len(parity.RESIDUALS) * len(parity.MODES)
    for sample in samples:
        assert sample["error"] is None and sample["equals_the_first"]
        for matrix in sample["matrices"]:
            assert matrix["first_step"] == matrix["last_step"] == 0
            assert matrix["ranks"] == matrix["ranks_on_cpu"]
    tall = samples[0]["matrices"][-1]
    assert tall["shape"] == [60, 33] and max(tall["ranks"]) <= 33 // 8 | 1


def test_memory_and_products_have_a_speed(written) -> None:
    device, copies, *products = samples_of(written, "ceilings")
    assert device == {"what": "device", "name": "cpu"}
    assert copies["bytes"] / copies["seconds"]["median"] > 1e6
    assert len(products) == 3 * len(SMALL.ranks) * len(ceilings.PRECISIONS)
    assert all(seconds > 0 for sample in products for seconds in medians(sample))


def test_operators_of_a_step_are_counted(written) -> None:
    samples = samples_of(written, "launches")
    for dtype in ("fp32", "bf16"):
        count = {
            (each["step"], each["optimizer"]): each["operators"]
            for each in samples
            if each["dtype"] == dtype
        }
        # its products and norms, but not a hundred
        steady = count[launches.STEADY, "residual none"] / samples[0]["matrices"]
        assert 5 < steady < 100
        assert count[launches.STEADY, ADAMW] < count[launches.STEADY, "residual none"]
        for rule in RULES:
            assert count[launches.STEADY, rule] < count[launches.REFRESH, rule]
    assert {each["kernels"] for each in samples} == {None}


def test_a_whole_step_has_times_state_and_temporary_memory(written) -> None:
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        own = [each for each in samples_of(written, "steps") if each["dtype"] == dtype]
        rounds = [each["seconds"] for each in own if "seconds" in each]
        memory = {each["optimizer"]: each for each in own if "optimizer" in each}
        assert len(rounds) == SMALL.rounds
        assert set(memory) == {ADAMW, *RULES, *(name + steps.REFRESH for name in RULES)}
        assert all(set(each) == set(memory) and min(each.values()) > 0 for each in rounds)
        moments = 2 * size * own[0]["parameters"]
        assert moments <= memory[ADAMW]["state"] < 1.01 * moments
        for rule in RULES:
            assert 0 < memory[rule]["state"] < 2 * 4 * own[0]["parameters"]
            assert 0 < memory[rule]["temporary"] <= memory[rule + steps.REFRESH]["temporary"]


def test_every_part_of_a_refresh_is_timed(written) -> None:
    samples = samples_of(written, "refreshes")
    assert len(samples) == 3 * len(SMALL.widths)
    for sample in samples:
        assert len(sample["seconds"]) == 9 and min(medians(sample)) > 0


def test_without_triton_lists_are_timed_in_pytorch_and_the_reason_is_told(written) -> None:
    samples = samples_of(written, "lists")
    assert {each["count"] for each in samples} == set(SMALL.lists)
    for sample in samples:
        assert list(sample["seconds"]) == ["plain"] and min(medians(sample)) > 0
    assert "grouped, not possible: no Triton that runs on cpu." in written[1]


def test_gloo_carries_every_kind_of_message(written) -> None:
    (sample,) = samples_of(written, "messages")
    (report,) = sample["reports"]
    assert report["error"] is None and list(report["seconds"]) == list(CHECKS)


def test_a_model_is_trained_by_both(written) -> None:
    adamw, ours = samples_of(written, "training")
    assert adamw["losses"][0] == ours["losses"][0]
    for sample in (adamw, ours):
        assert len(sample["losses"]) == len(sample["seconds"]) == SMALL.steps
        assert 4 < sample["losses"][-1] < 7  # log 258 is 5.55
    assert 0 < ours["state"] < adamw["state"]


# -- time and failures ----------------------------------------------------------------------------


def figures(samples: Samples) -> Figures:
    return Figures("counted", ["", "n"], [Block("", [["n", str(each["n"])] for each in samples])])


def section(name: str, measure: Any, seconds: float = 10) -> Section:
    return Section(name, name.title(), seconds, measure, figures)


def works(setting: Setting) -> Iterator[dict[str, Any]]:
    yield {"n": 1}
    yield {"n": 2}


def fails(setting: Setting) -> Iterator[dict[str, Any]]:
    yield {"n": 1}
    raise RuntimeError("CUDA error: an illegal memory access\nsecond line")


def measured(
    *sections: Section, out: Path, limit: float = 100
) -> tuple[list[Figures], dict[str, Any]]:
    tables = gpu.measure_sections(sections, HERE, out, limit=limit, in_process=True)
    return tables, json.loads(out.read_text())


def test_a_section_that_fails_is_told_with_what_it_has_and_the_others_run(tmp_path: Path) -> None:
    tables, whole = measured(
        section("broken", fails), section("whole", works), out=tmp_path / "gpu.json"
    )
    assert [table["status"] for table in whole["tables"]] == ["failed", "finished"]
    broken, after = whole["tables"]
    assert broken["reason"] == "RuntimeError: CUDA error: an illegal memory access"
    assert "in fails" in broken["log"] and broken["samples"] == [{"n": 1}]
    assert after["samples"] == [{"n": 1}, {"n": 2}]
    text = (tmp_path / "gpu.md").read_text()
    assert "broken: failed after 0 s: RuntimeError: CUDA error: an illegal" in text
    assert [len(table.blocks[0].rows) for table in tables] == [1, 2]


def test_a_table_that_cannot_be_made_loses_no_sample(tmp_path: Path) -> None:
    def other(setting: Setting) -> Iterator[dict[str, Any]]:
        yield {"m": 1}

    (table,), whole = measured(section("odd", other), out=tmp_path / "gpu.json")
    assert not table.blocks and table.notes == ["odd: no table of its samples: KeyError: 'n'."]
    assert whole["tables"][0]["samples"] == [{"m": 1}]
    assert "| n |" not in (tmp_path / "gpu.md").read_text()


def test_a_section_whose_time_is_over_stops_and_those_without_time_are_skipped(
    tmp_path: Path,
) -> None:
    def slow(setting: Setting) -> Iterator[dict[str, Any]]:
        for n in range(100):
            yield {"n": n}
            time.sleep(0.05)

    sections = (
        section("slow", slow, 0.05),
        section("long", works, 100),
        section("short", works, 1),
    )
    _, whole = measured(*sections, out=tmp_path / "gpu.json", limit=20)
    slow_one, long_one, short_one = whole["tables"]
    assert slow_one["status"] == "stopped" and 1 < len(slow_one["samples"]) < 100
    assert "its time was over after" in slow_one["reason"]
    assert long_one["status"] == "skipped" and not long_one["samples"]
    assert short_one["status"] == "finished"
    text = (tmp_path / "gpu.md").read_text()
    assert "long: skipped after 0 s: 20 s of 20 are left, and it may take 100." in text


def test_all_sections_together_take_nine_minutes_at_most() -> None:
    assert sum(each.seconds for each in SECTIONS.values()) <= LIMIT <= 60 * MINUTES - 10
    assert SECTIONS["messages"].seconds > 2 * messages.SECONDS


def test_a_section_of_its_own_process_is_killed_when_its_time_is_over() -> None:
    began = time.monotonic()
    outcome = child.run_in_child(SECTIONS["ceilings"], HERE, 0.5, threads=1)
    assert outcome.status == "stopped" and "0 s were over, and it was killed" in str(outcome.reason)
    assert time.monotonic() - began < 10


def test_what_a_process_has_found_outlives_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(folder: Path, seconds: float) -> int:
        kept = {"status": "running", "seconds": 1.0, "samples": [{"n": 1}]}
        (folder / child.OUTCOME).write_text(json.dumps(kept))
        (folder / child.LOG).write_text("Fatal Python error: Segmentation fault\n")
        return -11

    monkeypatch.setattr(child, "_exit_code", crash)
    outcome = child.run_in_child(section("any", works), HERE, 5, threads=None)
    assert (outcome.status, outcome.reason) == ("failed", "exit code -11")
    assert outcome.samples == [{"n": 1}] and "Segmentation fault" in str(outcome.log)
    table = figures_of(section("any", works), outcome)
    assert len(table.blocks[0].rows) == 1 and "exit code -11" in table.notes[-1]


def test_a_section_without_samples_has_no_table() -> None:
    table = figures_of(section("any", works), Outcome("skipped", reason="no time"))
    assert table.markdown() == "**Any**\n\nany: skipped after 0 s: no time."


def test_full_sizes_are_refused_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path / "gpu.json")]) == 2
    assert "pass --small" in capsys.readouterr().err


def test_full_sizes_are_those_of_a_model_and_of_three_kinds_of_shapes() -> None:
    square, wide, tall = FULL.shapes
    assert square[0] == square[1] and wide[0] < wide[1] and tall[0] > tall[1]
    assert FULL.ranks[0] == FULL.rank and set(FULL.ranks) == {64, 128, 256}
    assert set(FULL.lists) == {1, 8, 24}


# -- what only a GPU has --------------------------------------------------------------------------


def test_a_profile_is_read_for_kernels_copies_and_waits() -> None:
    host, device = "CPU", "CUDA"
    events = [
        *[("aten::mm", host), ("cudaLaunchKernel", host), ("cudaDeviceSynchronize", host)],
        *[("Optimizer.step#AdaRankGrad.step", host), ("Optimizer.step#AdaRankGrad.step", device)],
        *[("sm90_gemm", device)] * 3,
        *[("Memcpy DtoH (Device -> Pageable)", device), ("Memcpy HtoD (Pinned -> Device)", device)],
        *[("Memcpy DtoD (Device -> Device)", device), ("Memset (Device)", device)],
        *[("cudaStreamSynchronize", host)] * 2,
    ]
    found = launches.on_cuda(events)
    assert found["kernels"] == 3 and found["waits"] == 2 and found["memset"] == 1
    assert found["to_host"] == found["to_device"] == 1
    assert found["runtime"]["cudaLaunchKernel"] == 1
    unseen = launches.on_cuda([("aten::mm", host)])
    assert unseen["kernels"] is None and "CUPTI" in unseen["reason"]


def test_the_device_is_busy_while_a_call_is_issued(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(clock, "COLD_BYTES", 2**20)
    timed = clock.DeviceTime(CPU)
    clears: list[int] = []
    clear = timed._clear
    monkeypatch.setattr(timed, "_clear", lambda times: (clears.append(times), clear(times)))
    calls: list[int] = []
    taken = timed(lambda: (calls.append(1), time.sleep(0.01)))
    assert len(calls) == 2 and taken >= 0.01
    assert clears[0] >= 0.01 / timed._clearing


def test_kernels_are_held_against_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "available", lambda device: True)
    by_pytorch = SimpleNamespace(project=plain_project, apply=plain_apply)
    monkeypatch.setattr(subspace, "grouped_kernels", by_pytorch, raising=False)
    found = list(lists.measure(HERE))
    assert {each["difference"] for each in found} == {0.0}
    table = lists.figures(found)
    assert all(len(row) == len(table.columns) for block in table.blocks for row in block.rows)
    assert len(table.notes) == 1

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("PassManager::run failed")

    failing = SimpleNamespace(project=broken, apply=plain_apply)
    monkeypatch.setattr(subspace, "grouped_kernels", failing)
    found = [each for each in lists.measure(HERE) if each["product"] == "project"]
    assert all(list(each["seconds"]) == ["plain"] for each in found)
    assert "PassManager::run failed." in lists.figures(found).notes[-1]


def test_what_has_no_deterministic_form_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> Any:
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")

    monkeypatch.setattr(parity, "RESIDUALS", ("matched",))
    modes = {parity.FIRST: parity.MODES[parity.FIRST], "deterministic": refuses}
    monkeypatch.setattr(parity, "MODES", modes)
    table = parity.figures(list(parity.measure(HERE)))
    assert [len(block.rows) for block in table.blocks] == [4, 4]
    assert "fp32, matched, deterministic: RuntimeError: cumsum_cuda_kernel does" in table.notes[1]


def test_what_nccl_says_to_two_processes_on_one_gpu_is_told() -> None:
    refused = {"seconds": {}, "error": "gather of an object: DistBackendError: Duplicate GPU"}
    works_alone = {"seconds": dict.fromkeys(CHECKS, 0.0015), "error": None}
    alone = {"processes": 1, "backend": "nccl", "exit_codes": [0], "logs": []}
    pair = {"processes": 2, "backend": "nccl", "exit_codes": [1, None], "logs": ["", "Aborted"]}
    pair |= {"limit": 18.0}
    reports = {"reports": [refused] * 2}
    table = messages.figures([alone | {"reports": [works_alone]}, pair | reports])
    assert {tuple(row[1:]) for row in table.blocks[0].rows} == {("1.50", "no")}
    assert table.notes[1:] == [
        "nccl, 2 processes: gather of an object: DistBackendError: Duplicate GPU.",
        "nccl, 2 processes: not finished after 18 s, killed.",
    ]
    lost = {"reports": [{"seconds": {}, "error": None}] * 2}
    assert messages.figures([pair | lost]).notes[1] == "nccl, 2 processes: Aborted."


def test_the_device_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"name": "H200", "major": 9, "minor": 0, "multi_processor_count": 132}
    found = SimpleNamespace(**about, total_memory=141 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    told = "driver_version, power.limit [W]\n570.1, 700.00 W\n"
    run = SimpleNamespace(stdout=told)
    monkeypatch.setattr(ceilings.subprocess, "run", lambda *args, **options: run)
    facts = ceilings.device_facts(torch.device("cuda"))
    assert facts["driver_version"] == "570.1" and facts["NCCL"] == "2.27.5"
    assert facts["capability"] == "9.0" and facts["memory, MiB"] == 141 * 1024
