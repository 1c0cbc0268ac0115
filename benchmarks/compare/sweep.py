"""Run a comparison: learning rates of all methods, interleaved, then more seeds of the best.

The order of a method's learning rates is that of :func:`benchmarks.compare.plan.plan`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.compare.choice import Choice, best_rates, interleaved
from benchmarks.compare.methods import Method
from benchmarks.compare.plan import Pair, Rates, plan
from benchmarks.compare.records import Records, Trial
from benchmarks.compare.task import Task

Tell = Callable[[str], None]


@dataclass
class Sweep:
    """Runs the trials of a comparison.

    Attributes:
        records: where runs are stored.
        task: settings passed to every run.
        methods: the methods to compare.
        rates: learning rates to try, by method name.
        seeds: the first one is the sweep's.
        jobs: number of concurrent runs.
        all_seeds: whether to run all pairs of rates that are tried on all seeds.
        kind: ``"pretrain"`` or ``"finetune"``.
        tell: prints a line.
        child: command of a run; its two files are appended.
    """

    records: Records
    task: Task
    methods: Sequence[Method]
    rates: Mapping[str, Rates]
    seeds: Sequence[int]
    jobs: int
    all_seeds: bool
    kind: str
    tell: Tell
    child: Sequence[str] = (sys.executable, "-m", "benchmarks.compare.child")
    _children: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _stopping: bool = False
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        """Run all trials that are not done yet.

        Raises:
            KeyboardInterrupt: on Ctrl-C, after the active runs are killed and discarded.
            SystemExit: on SIGTERM, likewise.
        """
        self._sweep_rates()
        chosen = []
        for method in self.methods:
            best = self._best(method.name)
            if best is None:
                self.tell(f"{method.name}: no run finished; skipping the other seeds")
            else:
                pair = (best.lr, best.rest_lr)
                chosen.append([Trial(method.name, *pair, seed) for seed in self.seeds[1:]])
        self._run_all(interleaved(chosen))

    def _sweep_rates(self) -> None:
        """Run each method's plan, a batch of every method at a time."""
        plans = {
            m.name: plan(self.rates[m.name], partial(self._best, m.name)) for m in self.methods
        }
        while batches := {name: batch for name, each in plans.items() if (batch := next(each, []))}:
            self._run_pairs(batches)
            plans = {name: plans[name] for name in batches}

    def _run_pairs(self, batches: Mapping[str, Sequence[Pair]]) -> None:
        trials = []
        for seed in self.seeds if self.all_seeds else self.seeds[:1]:
            rows = [[Trial(name, *p, seed) for p in pairs] for name, pairs in batches.items()]
            trials += interleaved(rows)
        self._run_all(trials)

    def _best(
        self, method: str, lr: float | None = None, rest_lr: float | None = None
    ) -> Choice | None:
        """The best pair run so far, among those with the given rates; None admits any."""
        runs = [
            run
            for run in self.records.runs()
            if run["method"] == method
            and lr in (None, run["lr"])
            and rest_lr in (None, run["rest_lr"])
        ]
        return best_rates(runs, self.seeds[0], self.task.measure)

    def _run_all(self, trials: Iterable[Trial]) -> None:
        """Run those of `trials` that are not done yet, in order."""
        done = self.records.done()
        waiting = [trial for trial in trials if trial not in done]
        pool = ThreadPoolExecutor(self.jobs)
        try:
            futures = {pool.submit(self._run_one, trial): trial for trial in waiting}
            for number, future in enumerate(as_completed(futures), start=1):
                trial = futures[future]
                run = self.records.add(trial, future.result())
                self.tell(f"{number} of {len(waiting)}: {trial.label}: {_outcome(run)}")
        except BaseException:
            self._stop_children()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _run_one(self, trial: Trial) -> dict[str, Any]:
        """Run a trial in its own process; a process that fails yields a ``failed`` result."""
        folder = self.records.directory / "runs"
        folder.mkdir(exist_ok=True)
        log, result = folder / f"{trial.label}.log", folder / f"{trial.label}.result.json"
        task, kept = folder / f"{trial.label}.trial.json", folder / f"{trial.label}.kept"
        method = next(method for method in self.methods if method.name == trial.method)
        task.write_text(
            json.dumps(
                {
                    "kind": self.kind,
                    "job": self.task.job,
                    "method": asdict(method),
                    "lr": trial.lr,
                    "rest_lr": trial.rest_lr,
                    "seed": trial.seed,
                    "data": self.task.data,
                    "kept": str(kept),
                    "parent": os.getpid(),
                }
            )
        )
        result.unlink(missing_ok=True)
        command = [*self.child, str(task), str(result)]
        with open(log, "wb") as output:
            code = self._wait_for(command, output.fileno())
        try:
            results = dict(json.loads(result.read_text()))
            kept.unlink(missing_ok=True)
            return results
        except FileNotFoundError:
            return {"status": "failed", "final": None, "error": _failure(log, code)}
        finally:
            result.unlink(missing_ok=True)
            task.unlink(missing_ok=True)

    def _wait_for(self, command: list[str], output: int) -> int:
        # A session of its own: only this process receives Ctrl-C, and then kills the others.
        with self._guard:
            if self._stopping:
                return -signal.SIGTERM
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            self._children.add(child)
        try:
            return child.wait()
        finally:
            with self._guard:
                self._children.discard(child)

    def _stop_children(self) -> None:
        with self._guard:
            self._stopping = True
            for child in self._children:
                child.kill()


def _outcome(run: dict[str, Any]) -> str:
    if run["status"] == "finished":
        return f"{run['measure']} {run['final']:.4f} ({run['total_seconds']:.0f} s)"
    return f"{run['status']}: {run['error']}"


def _failure(log: Path, code: int) -> str:
    """Why a process exited without a result: the signal, or the last line of its log."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}"
