"""Run a comparison: learning rates of all methods, interleaved, then more seeds of the best."""

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
from pathlib import Path
from typing import Any

from benchmarks.compare.choice import best_rate, interleaved
from benchmarks.compare.methods import Method
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
        rates: learning rates by method name.
        seeds: the first one is the sweep's.
        jobs: number of concurrent runs.
        all_seeds: whether to run all rates on all seeds.
        kind: ``"pretrain"`` or ``"finetune"``.
        tell: prints a line.
        child: command of a run; its two files are appended.
    """

    records: Records
    task: Task
    methods: Sequence[Method]
    rates: Mapping[str, Sequence[float]]
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
        sweep, *more = self.seeds
        first = [[Trial(m.name, lr, sweep) for lr in self.rates[m.name]] for m in self.methods]
        swept = interleaved(first)
        if self.all_seeds:
            swept += [Trial(t.method, t.lr, seed) for seed in more for t in interleaved(first)]
        self._run_all(swept)
        chosen = []
        for method in self.methods:
            runs = [run for run in self.records.runs() if run["method"] == method.name]
            best = best_rate(runs, sweep, self.task.measure)
            if best is None:
                self.tell(f"{method.name}: no run finished; skipping the other seeds")
            else:
                chosen.append([Trial(method.name, best.lr, seed) for seed in more])
        self._run_all(interleaved(chosen))

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
        task = folder / f"{trial.label}.trial.json"
        method = next(method for method in self.methods if method.name == trial.method)
        task.write_text(
            json.dumps(
                {
                    "kind": self.kind,
                    "job": self.task.job,
                    "method": asdict(method),
                    "lr": trial.lr,
                    "seed": trial.seed,
                    "data": self.task.data,
                    "parent": os.getpid(),
                }
            )
        )
        result.unlink(missing_ok=True)
        command = [*self.child, str(task), str(result)]
        with open(log, "wb") as output:
            code = self._wait_for(command, output.fileno())
        try:
            return dict(json.loads(result.read_text()))
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
