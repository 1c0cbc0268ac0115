"""A comparison's runs: their order, the best rate, what is kept, and what is not run again."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from arg_dist.cli.parsing import InputError
from benchmarks.compare.choice import Choice, best_rates, interleaved
from benchmarks.compare.methods import Method, choose
from benchmarks.compare.plan import Rates, neighbours, plan
from benchmarks.compare.records import RUNS, Records, Trial
from benchmarks.compare.sweep import Sweep
from benchmarks.compare.task import Task
from launchers.reporting.measures import LOSS, MEASURES
from tests.patience import patient

LOWER, HIGHER = MEASURES[LOSS], MEASURES["matthews"]
A, B = Method("a", "adamw", {}), Method("b", "adamw", {})

STUB = """
import json, os, signal, sys
trial = json.loads(open(sys.argv[1]).read())
name = trial["method"]["name"]
with open("order.txt", "a") as order:
    rest = "" if trial["rest_lr"] == trial["lr"] else f"/{trial['rest_lr']}"
    order.write(f"{name} {trial['lr']}{rest} {trial['seed']}\\n")
if trial["lr"] == 0.5:
    os.kill(os.getpid(), signal.SIGKILL)
if trial["lr"] == 0.25:
    sys.exit("no room left")
status = "diverged" if trial["lr"] == 2.0 else "finished"
final = abs(trial["lr"] - {"a": 3, "b": 4}[name]) + trial["seed"] / 100
final += abs(trial["rest_lr"] - 7) if rest else 0
out = {"status": status, "error": "step 2: the loss is nan", "measure": "held_out_loss"}
out |= {"final": final if status == "finished" else None, "total_seconds": 0.0}
json.dump(out, open(sys.argv[2], "w"))
"""


def run(
    lr: float, seed: int, final: float | None, rest_lr: float | None = None
) -> dict[str, object]:
    status = "finished" if final else "diverged"
    rest_lr = lr if rest_lr is None else rest_lr
    return {"lr": lr, "rest_lr": rest_lr, "seed": seed, "final": final, "status": status}


def one_rate(lr: float, edge: bool, seeds: tuple[int, ...]) -> Choice:
    return Choice(lr, lr, edge, False, seeds)


def test_the_best_rate_is_that_of_the_sweeps_seed():
    runs = [run(1, 0, 3.0), run(2, 0, 2.0), run(4, 0, 2.5), run(8, 0, None), run(2, 1, 9.0)]
    assert best_rates(runs, 0, LOWER) == one_rate(2, False, (0,))
    assert best_rates(runs, 0, HIGHER) == one_rate(1, True, (0,))
    assert best_rates([*runs, run(16, 0, 1.0)], 0, LOWER) == one_rate(16, True, (0,))
    assert best_rates([run(1, 0, 3.0)], 0, LOWER) == one_rate(1, False, (0,))


def test_with_all_seeds_the_median_decides():
    runs = [run(1, 0, 2.0), run(1, 1, 5.0), run(1, 2, 5.0), run(2, 0, 3.0), run(2, 1, 3.0)]
    assert best_rates(runs, 0, LOWER) == one_rate(2, True, (0, 1))
    assert best_rates(runs[:-1], 0, LOWER) == one_rate(1, True, (0,))


def test_the_best_pair_tells_which_of_its_rates_is_at_an_end():
    runs = [run(1, 0, 3.0, 5), run(2, 0, 2.0, 5), run(4, 0, 2.5, 5)]
    assert best_rates(runs, 0, LOWER) == Choice(2, 5, False, False, (0,))
    runs += [run(2, 0, 1.5, 7)]
    assert best_rates(runs, 0, LOWER) == Choice(2, 7, False, True, (0,))
    runs += [run(2, 0, 1.8, 9), run(4, 0, 1.4, 7)]
    assert best_rates(runs, 0, LOWER) == Choice(4, 7, True, False, (0,))
    # a rate of the rest may happen to be that of the matrices
    runs += [run(7, 0, 1.0, 7)]
    assert best_rates(runs, 0, LOWER) == Choice(7, 7, True, False, (0,))


def test_nothing_is_best_where_nothing_came_to_its_end():
    assert best_rates([run(1, 0, None), run(2, 0, None)], 0, LOWER) is None
    assert best_rates([run(1, 1, 3.0)], 0, LOWER) is None


def test_methods_take_turns():
    assert interleaved(["ab", "cde", ""]) == list("acbde")
    assert interleaved([]) == []


def planned(rates: Rates, final) -> list[list[tuple[float, float]]]:
    """The batches of a plan whose runs come to `final(lr, rest_lr)`; None diverges."""
    runs: list[dict[str, object]] = []

    def best(lr, rest_lr):
        found = [r for r in runs if lr in (None, r["lr"]) and rest_lr in (None, r["rest_lr"])]
        return best_rates(found, 0, LOWER)

    batches = []
    for batch in plan(rates, best):
        batches.append(batch)
        runs += [run(lr, 0, final(lr, rest_lr), rest_lr) for lr, rest_lr in batch]
    return batches


FOUR, THREE = (1.0, 2.0, 4.0, 8.0), (10.0, 20.0, 40.0)
FIRST = [(1.0, 20.0), (2.0, 20.0), (4.0, 20.0), (8.0, 20.0)]


def test_the_rest_is_swept_at_the_best_rate_of_the_matrices():
    batches = planned(Rates(FOUR, THREE), lambda lr, rest: abs(lr - 2) + abs(rest - 20) + 1)
    assert batches == [FIRST, [(2.0, 10.0), (2.0, 40.0)]]


def test_another_rate_of_the_rest_has_the_neighbours_of_the_best_until_it_lies_between_two():
    def final(lr: float, rest: float) -> float:
        return abs(lr - (2 if rest == 20 else 4)) + rest

    batches = planned(Rates(FOUR, THREE), final)
    assert batches == [
        FIRST, [(2.0, 10.0), (2.0, 40.0)], [(1.0, 10.0), (4.0, 10.0)], [(8.0, 10.0)],
    ]  # fmt: skip
    at_an_end = planned(Rates(FOUR, THREE), lambda lr, rest: lr + rest)
    assert at_an_end == [FIRST, [(1.0, 10.0), (1.0, 40.0)], [(2.0, 10.0)]]


def test_one_rate_for_all_and_one_rate_of_the_rest_are_one_row():
    assert planned(Rates((1.0, 2.0)), lambda lr, rest: lr) == [[(1.0, 1.0), (2.0, 2.0)]]
    assert planned(Rates((1.0, 2.0), (5.0,)), lambda lr, rest: lr) == [[(1.0, 5.0), (2.0, 5.0)]]
    assert Rates((1.0,), (5.0, 6.0)).first_rest == 5.0


def test_a_plan_ends_where_nothing_finished():
    assert planned(Rates(FOUR, THREE), lambda lr, rest: None) == [FIRST]


def test_neighbours_are_the_next_ones_on_both_sides():
    assert neighbours(FOUR, 2.0) == [1.0, 4.0]
    assert neighbours(FOUR, 8.0) == [4.0]
    assert neighbours(FOUR, 3.0) == [2.0, 4.0]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory to run in, with a stub in the place of the process that trains."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sweep(directory: Path, rates, *, seeds=(0, 1), said=None, **more) -> Sweep:
    names = list(rates)
    return Sweep(
        Records(directory / "out"),
        task=Task({}, "", {}, LOWER),
        methods=[method for method in (A, B) if method.name in names],
        rates={name: Rates(each, more.get("rest", ())) for name, each in rates.items()},
        seeds=list(seeds),
        jobs=1,
        all_seeds=more.pop("all_seeds", False),
        kind="pretrain",
        tell=(said if said is not None else []).append,
        child=(sys.executable, "-S", "stub.py"),
    )


def order(directory: Path) -> list[str]:
    return (directory / "order.txt").read_text().splitlines()


def begin(directory: Path, job=None, methods=(A, B), seed=0, redo=()):
    records = Records(directory / "out")
    with records.locked():
        records.begin(job or {"steps": 3}, methods, sweep_seed=seed, command="x", redo=redo)
    return records


def test_rates_take_turns_and_the_best_one_has_the_other_seeds(here):
    records = begin(here)
    sweep(here, {"a": (1.0, 3.0), "b": (4.0, 8.0)}, seeds=(0, 1, 2)).run()
    assert order(here) == [
        "a 1.0 0", "b 4.0 0", "a 3.0 0", "b 8.0 0", "a 3.0 1", "b 4.0 1", "a 3.0 2", "b 4.0 2",
    ]  # fmt: skip
    assert records.done()[Trial("b", 4.0, 4.0, 2)]["final"] == 0.02
    # the same again runs nothing; a further rate runs alone
    sweep(here, {"a": (1.0, 3.0), "b": (4.0, 8.0)}, seeds=(0, 1, 2)).run()
    assert len(order(here)) == 8
    sweep(here, {"a": (2.5, 3.0)}, seeds=(0, 1, 2)).run()
    assert order(here)[8:] == ["a 2.5 0"]


def test_two_rates_are_swept_in_turns_by_all_methods(here):
    records, rates = begin(here), {"a": (1.0, 3.0), "b": (4.0, 8.0)}
    sweep(here, rates, rest=(5.0, 6.5)).run()
    assert order(here) == [
        "a 1.0/5.0 0", "b 4.0/5.0 0", "a 3.0/5.0 0", "b 8.0/5.0 0",
        "a 3.0/6.5 0", "b 4.0/6.5 0",
        "a 1.0/6.5 0", "b 8.0/6.5 0",
        "a 3.0/6.5 1", "b 4.0/6.5 1",
    ]  # fmt: skip
    assert records.done()[Trial("a", 3.0, 6.5, 1)]["final"] == pytest.approx(0.51)
    sweep(here, rates, rest=(5.0, 6.5)).run()
    assert len(order(here)) == 10


def test_all_seeds_run_every_pair_that_is_tried(here):
    begin(here)
    sweep(here, {"a": (1.0, 3.0)}, rest=(6.5, 9.0), all_seeds=True).run()
    assert order(here) == [
        "a 1.0/6.5 0", "a 3.0/6.5 0", "a 1.0/6.5 1", "a 3.0/6.5 1", "a 3.0/9.0 0", "a 3.0/9.0 1",
    ]  # fmt: skip


def test_runs_with_one_rate_for_all_parameters_are_refused(tmp_path):
    records = begin(tmp_path)
    old = {"method": "a", "lr": 0.1, "seed": 0, "status": "finished", "final": 1.0}
    (tmp_path / "out" / RUNS).write_text(json.dumps(old) + "\n")
    with pytest.raises(InputError, match=r"1 runs have one learning rate.*another --out") as error:
        records.runs()
    assert "not valid" not in str(error.value)


def test_a_label_names_the_second_rate_where_there_is_one():
    assert Trial("a", 0.5, 0.5, 0).label == "a-0.5-seed0"
    assert Trial("a", 0.5, 0.25, 0).label == "a-0.5-rest0.25-seed0"


def test_all_seeds_run_all_rates(here):
    begin(here)
    sweep(here, {"a": (1.0, 3.0)}, all_seeds=True).run()
    assert order(here) == ["a 1.0 0", "a 3.0 0", "a 1.0 1", "a 3.0 1"]


def test_runs_that_die_or_diverge_are_told_and_stop_nothing(here):
    records, said = begin(here), []
    sweep(here, {"a": (0.25, 0.5, 2.0, 3.0)}, seeds=(0,), said=said).run()
    found = {run["lr"]: (run["status"], run["error"]) for run in records.runs()}
    assert found[0.25] == ("failed", "no room left")
    assert found[0.5] == ("failed", "killed by SIGKILL")
    assert found[2.0] == ("diverged", "step 2: the loss is nan")
    assert found[3.0][0] == "finished"
    assert any("a-0.5-seed0: failed: killed by SIGKILL" in line for line in said)
    # what was killed is tried again, what diverged would diverge again
    sweep(here, {"a": (0.25, 0.5, 2.0, 3.0)}, seeds=(0,)).run()
    assert order(here)[4:] == ["a 0.25 0", "a 0.5 0"]
    assert len(records.runs()) == 4


def test_a_method_without_any_result_has_no_further_seeds(here):
    begin(here)
    said: list[str] = []
    sweep(here, {"a": (0.5, 2.0)}, said=said).run()
    assert said[-1] == "a: no run finished; skipping the other seeds"
    assert len(order(here)) == 2


def test_another_job_or_seed_is_refused(tmp_path):
    begin(tmp_path, {"steps": 3, "text": {"sha256": "ab"}})
    with pytest.raises(InputError, match="contains runs with different steps \\(3, now 4\\)"):
        begin(tmp_path, {"steps": 4, "text": {"sha256": "ab"}})
    with pytest.raises(InputError, match="different text \\(sha256=ab, now cd\\)"):
        begin(tmp_path, {"steps": 3, "text": {"sha256": "cd"}})
    with pytest.raises(InputError, match="compared on seed 0"):
        begin(tmp_path, {"steps": 3, "text": {"sha256": "ab"}}, seed=1)


def test_a_name_stands_for_one_definition_unless_its_runs_are_set_aside(tmp_path):
    (low,) = choose(["recommended"], peer_rank=4, overrides=["energy=0.6"])
    (high,) = choose(["recommended"], peer_rank=4, overrides=["energy=0.7"])
    records = begin(tmp_path, methods=[low])
    begin(tmp_path, methods=[high])  # no run yet: nothing can be mixed up
    for name in ("recommended", "a"):
        records.add(Trial(name, 0.1, 0.1, 0), {"status": "finished", "final": 1.0})
    with pytest.raises(InputError, match=r"energy=0\.7, now 0\.6.*--redo recommended"):
        begin(tmp_path, methods=[low])
    begin(tmp_path, methods=[low], redo=["recommended"])
    assert [run["method"] for run in records.runs()] == ["a"]
    (aside,) = (tmp_path / "out" / "set_aside.jsonl").read_text().splitlines()
    assert json.loads(aside)["method"] == "recommended"


def test_one_comparison_at_a_time_works_in_a_directory(tmp_path):
    records = Records(tmp_path / "out")
    with (
        records.locked(),
        pytest.raises(InputError, match="another comparison is running"),
        Records(tmp_path / "out").locked(),
    ):
        pass


def test_files_that_are_none_of_ours_are_told(tmp_path):
    records = begin(tmp_path)
    (tmp_path / "out" / RUNS).write_text('{"method": "a"}\n')
    with pytest.raises(InputError, match=r"runs\.jsonl: not valid comparison runs"):
        records.runs()
    (tmp_path / "out" / "comparison.json").write_text("[]")
    with pytest.raises(InputError, match=r"comparison\.json: not a valid comparison"):
        records.comparison()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["report", "nowhere"], "nowhere: contains no comparison runs"),
        (["pretrain", "--out", "x", "--lrs", "adamw"], "expected METHOD=1e-3,2e-3,..."),
        (
            ["pretrain", "--out", "x", "--rest-lr", "1e-3", "0"],
            "expected a number above 0, got '0'",
        ),
        (["pretrain", "--out", "x", "--rest-lr", "adamw="], "expected METHOD=1e-3,2e-3,..."),
        (["pretrain", "--out", "x", "--peer-rank", "1.5"], "got '1.5'"),
        (["pretrain", "--out", "x", "--methods", "lora"], "--methods lora: unknown method"),
    ],
)
def test_the_command_line_tells_mistakes_in_one_line(words, told, tmp_path, monkeypatch, capsys):
    from benchmarks.compare.cli import main

    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_module_is_a_command():
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare", "report", "nowhere"],
        capture_output=True,
        text=True,
        timeout=patient(50),
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stderr == "compare: nowhere: contains no comparison runs\n"


def write_tokens(folder: Path) -> None:
    """Random tokens to train on, and others to evaluate."""
    import numpy as np

    for part, seed in (("training", 1), ("held_out", 2)):
        numbers = np.random.default_rng(seed).integers(0, 258, 4000).astype(np.uint16)
        np.save(folder / f"{part}.npy", numbers)


def small_job(**own):
    """A job of a few small steps."""
    from benchmarks.compare.pretraining import PretrainingJob

    shared = {
        "model": "pico", "vocab_size": 258, "micro_batch": 2, "seq_len": 16, "min_lr_ratio": 0.1,
        "clip": 1.0, "weight_decay": 0.0, "eval_sequences": 3, "device": "cpu",
    }  # fmt: skip
    return PretrainingJob(**shared, **own)


def test_weights_and_batches_depend_on_the_seed_alone(tmp_path):
    from benchmarks.compare.pretraining import pretrain

    write_tokens(tmp_path)
    job = small_job(steps=2, batch_size=4, warmup=1, eval_every=1)

    def losses(name: str, seed: int) -> list[str]:
        (method,) = choose([name], peer_rank=4)
        said: list[str] = []
        # a rate at which no weight moves shows what all methods begin with
        pretrain(job, method, lr=1e-30, rest_lr=1e-30, seed=seed, tokens=tmp_path, show=said.append)
        return said

    adamw = losses("adamw", 0)
    assert len(adamw) == 2 and len({line.split()[3] for line in adamw}) == 2
    assert losses("recommended", 0) == losses("apollo", 0) == adamw
    assert losses("adamw", 1) != adamw


def test_a_compiled_model_learns_the_same(tmp_path, monkeypatch):
    import torch

    from benchmarks.compare.pretraining import pretrain

    write_tokens(tmp_path)
    (method,) = choose(["recommended"], peer_rank=4)
    compiled, compile_with = [], torch.compile

    def traced(forward, **options):  # without generating C++, which takes a minute
        compiled.append(forward)
        return compile_with(forward, backend="eager", fullgraph=True, **options)

    def losses(*, compile: bool) -> list[str]:
        job = small_job(steps=4, batch_size=2, warmup=1, eval_every=2, compile=compile)
        said: list[str] = []
        rates = {"lr": 1e-3, "rest_lr": 2e-3, "seed": 0}
        pretrain(job, method, **rates, tokens=tmp_path, show=said.append)
        return said

    monkeypatch.setattr(torch, "compile", traced)
    assert losses(compile=True) == losses(compile=False)
    assert len(compiled) == 1


@pytest.mark.parametrize("name", ["recommended", "galore", "muon"])
def test_a_run_that_was_interrupted_goes_on_to_the_bit(name, tmp_path):
    from benchmarks.compare.pretraining import pretrain

    write_tokens(tmp_path)
    job = small_job(steps=6, batch_size=2, warmup=1, eval_every=2, dtype="bf16")
    (method,) = choose([name], peer_rank=4)

    def run(show=print, **more) -> dict:
        rates = {"lr": 1e-3, "rest_lr": 2e-3, "seed": 0}
        return pretrain(job, method, **rates, tokens=tmp_path, show=show, **more)

    def stop(line: str) -> None:
        if line.startswith("step 6"):
            raise KeyboardInterrupt

    whole, kept = run(), tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        run(stop, kept=kept)
    said: list[str] = []
    again = run(said.append, kept=kept)
    assert len(said) == 1
    assert [again[key] for key in ("curve", "state", "ranks")] == [
        whole[key] for key in ("curve", "state", "ranks")
    ]
    assert [point["step"] for point in again["progress"]] == [2, 4, 6]
    run(said.append, kept=kept)
    method = replace(method, settings=method.settings | {"rest_betas": (0.5, 0.5)})
    if name != "recommended":
        run(said.append, kept=kept)
        assert len(said) == 5  # a run of another method begins anew


def test_a_run_that_diverges_says_at_which_step(tmp_path):
    import numpy as np

    from benchmarks.compare.pretraining import pretrain

    for part in ("training", "held_out"):
        np.save(tmp_path / f"{part}.npy", np.arange(4000, dtype=np.uint16) % 258)
    job = small_job(steps=6, batch_size=2, warmup=0, eval_every=6)
    (method,) = choose(["adamw"], peer_rank=4)
    results = pretrain(job, method, lr=1e30, rest_lr=1e-3, seed=0, tokens=tmp_path, show=print)
    assert results["status"] == "diverged" and results["final"] is None
    assert results["error"].startswith("step ") and results["error"].endswith("loss is nan")
    assert results["steps"] < 6
