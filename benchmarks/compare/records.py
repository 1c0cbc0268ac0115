"""The directory of a comparison: its definition, and one line for each completed run.

``comparison.json`` stores the shared settings and the definition of each method; ``runs.jsonl``
stores the runs. All runs in a directory are comparable: a different job, or a different method
under a name that already has runs, is refused.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from arg_dist.checkpoint.files import write_atomically
from arg_dist.cli.parsing import InputError
from benchmarks.compare.methods import Method
from launchers.reporting.files import write_json

COMPARISON = "comparison.json"
RUNS = "runs.jsonl"
SET_ASIDE = "set_aside.jsonl"


class Trial(NamedTuple):
    """One run of a comparison.

    Attributes:
        method: the method's name.
        lr: peak learning rate of the low-rank matrices.
        rest_lr: that of all other parameters; equal to `lr` if one rate serves for both.
        seed: seeds weights and batches.
    """

    method: str
    lr: float
    rest_lr: float
    seed: int

    @property
    def label(self) -> str:
        """A name usable in file names."""
        rest = "" if self.rest_lr == self.lr else f"-rest{self.rest_lr!r}"
        return f"{self.method}-{self.lr!r}{rest}-seed{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """The contents of ``comparison.json``.

    Attributes:
        job: identity of the job, shared by all runs: the task's settings, the data, versions.
        sweep_seed: the seed on which the learning rates are compared.
        methods: definitions by name, in table order.
        commands: the commands that have run in the directory.
    """

    job: dict[str, Any]
    sweep_seed: int
    methods: dict[str, dict[str, Any]]
    commands: list[str]


class Records:
    """Reads and writes the files of a comparison's directory; allows one writing process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory against other writing processes.

        Raises:
            InputError: another process holds the lock, or the directory cannot be created.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock: IO[str] = open(self.directory / ".lock", "w")  # noqa: SIM115 - closed below
        except OSError as error:
            raise InputError(f"--out {self.directory}: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"--out {self.directory}: another comparison is running here; wait for it, "
                    "or choose another directory"
                ) from None
            yield

    def comparison(self) -> Comparison | None:
        """The stored comparison; None before the first :meth:`begin`.

        Raises:
            InputError: ``comparison.json`` cannot be read.
        """
        path = self.directory / COMPARISON
        if not path.exists():
            return None
        try:
            return Comparison(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: not a valid comparison: {error}") from None

    def begin(
        self,
        job: dict[str, Any],
        methods: Iterable[Method],
        *,
        sweep_seed: int,
        command: str,
        redo: Iterable[str] = (),
    ) -> None:
        """Store what is compared, after checking it against what is stored already.

        Existing runs of methods in `redo` whose definition has changed are set aside.

        Raises:
            InputError: the job differs, or a method differs from the stored one of the same name.
        """
        job = _as_json(job)
        before = self.comparison() or Comparison(job, sweep_seed, {}, [])
        self._check_job(before.job, job)
        if before.sweep_seed != sweep_seed:
            raise InputError(
                f"--seeds {sweep_seed} ...: the learning rates in {self.directory} are compared "
                f"on seed {before.sweep_seed}; put it first, or use another --out"
            )
        definitions = {method.name: _as_json(method.definition()) for method in methods}
        for name, now in definitions.items():
            was = before.methods.get(name, now)
            if was != now and any(run["method"] == name for run in self.runs()):
                if name not in redo:
                    raise InputError(
                        f"--methods {name}: its runs in {self.directory} used "
                        f"{_difference(was, now)}; rerun them with --redo {name}, or use "
                        "another --out"
                    )
                self._set_aside(name)
        commands = [*before.commands, command]
        new = Comparison(job, sweep_seed, before.methods | definitions, commands)
        write_json(self.directory / COMPARISON, asdict(new))

    def _check_job(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        for key in before.keys() | now.keys():
            if before.get(key) != now.get(key):
                was, is_ = before.get(key), now.get(key)
                if isinstance(was, dict) and isinstance(is_, dict):
                    change = _difference(was, is_)
                else:
                    change = f"{was}, now {is_}"
                raise InputError(
                    f"--out {self.directory}: contains runs with different {key} ({change}); "
                    "use the same, or another --out"
                )

    def runs(self) -> list[dict[str, Any]]:
        """The runs in ``runs.jsonl``; for repeated trials, the last one.

        Raises:
            InputError: the file cannot be read, or its runs state one learning rate only.
        """
        path = self.directory / RUNS
        if not path.exists():
            return []
        try:
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            old = [line for line in lines if "lr" in line and "rest_lr" not in line]
            runs = {_trial_of(line): line for line in lines if line not in old}
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: not valid comparison runs: {error!r}") from None
        if old:
            raise InputError(
                f"{path}: {len(old)} runs have one learning rate for all parameters (no rest_lr); "
                "runs with a second one (--rest-lr) for all but the low-rank matrices cannot be "
                "compared with them; use another --out"
            )
        return list(runs.values())

    def done(self) -> dict[Trial, dict[str, Any]]:
        """The runs that need not be repeated; failed runs are retried."""
        return {_trial_of(run): run for run in self.runs() if run["status"] != "failed"}

    def add(self, trial: Trial, results: dict[str, Any]) -> dict[str, Any]:
        """Add the results of a run atomically: readers see the whole line or nothing."""
        run = _as_json({**trial._asdict(), **results})
        self._write(RUNS, [*self.runs_but(trial), run])
        return run

    def runs_but(self, trial: Trial) -> list[dict[str, Any]]:
        """All runs except those of `trial`."""
        return [run for run in self.runs() if _trial_of(run) != trial]

    def _set_aside(self, method: str) -> None:
        runs = self.runs()
        with open(self.directory / SET_ASIDE, "a") as file:
            file.writelines(json.dumps(run) + "\n" for run in runs if run["method"] == method)
        self._write(RUNS, [run for run in runs if run["method"] != method])

    def _write(self, name: str, runs: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(run, allow_nan=False) + "\n" for run in runs)
        write_atomically(self.directory / name, lambda temporary: temporary.write_text(text))


def _trial_of(run: dict[str, Any]) -> Trial:
    return Trial(run["method"], run["lr"], run["rest_lr"], run["seed"])


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """All differences, nested ones included, as ``"energy=0.6, now 0.8"``."""
    changes = []
    for key in before | now:
        was, is_ = before.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(is_, dict):
            changes += [_difference(was, is_)] if was != is_ else []
        elif was != is_:
            changes.append(f"{key}={was}, now {is_}")
    return "; ".join(changes)


def _as_json(value: Any) -> Any:
    """`value` after a JSON round trip; raises ValueError for NaN and infinities."""
    return json.loads(json.dumps(value, allow_nan=False))
