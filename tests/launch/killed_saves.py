"""Jobs that are killed while they save, each going on where the one before it was ended.

    python tests/launch/killed_saves.py random --out FILE --folder DIRECTORY --phases 1 --hit index
    python tests/launch/killed_saves.py exact --out FILE --folder DIRECTORY

All are forked from this process, which has imported everything. Writes which phases of a save were
hit how often, and everything that was not as it must be.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import os
import random
import select
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.patience import patient

faulthandler.dump_traceback_later(patient(390), exit=True)

import torch  # noqa: E402
from saving_jobs import KEEP, STEP, Orders, start, warm_up  # noqa: E402

from arg_dist.checkpoint.index import INDEX_NAME, CheckpointError  # noqa: E402
from arg_dist.checkpoint.reading import verified_index  # noqa: E402
from arg_dist.checkpoint.rotation import checkpoints_in  # noqa: E402
from arg_dist.sharding.communicator import Communicator  # noqa: E402

ROUND_SECONDS = 60
RANDOM_KILLS = 50
MORE_KILLS = 162
"""So many at most, while these have hit too few phases: the disk decides how long each lasts."""
SURVIVORS = 2
"""So many times the processes that were not killed are left to end by themselves."""


class Round:
    """One job, from its start to its end.

    Attributes:
        reports: what its processes have told.
    """

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.reports: list[dict[str, Any]] = []
        self._store = tempfile.TemporaryDirectory(prefix="rendezvous-")
        self._pids, self._pipe = start(orders, Path(self._store.name) / "store")
        self._unread = b""
        self._deadline = time.monotonic() + ROUND_SECONDS

    def follow(self, event: str = "", count: int = 1) -> bool:
        """Reads reports until there are so many of `event`, or no process is left; is it so?"""
        while sum(report["event"] == event for report in self.reports) < count:
            if not self._read(max(0.0, self._deadline - time.monotonic())):
                return False
        return True

    def kill(self, which: int | None = None) -> None:
        """SIGKILL for one of the processes, or for all; without a word before."""
        for pid in self._pids if which is None else [self._pids[which]]:
            os.kill(pid, signal.SIGKILL)

    def wait_for(self, which: int) -> bool:
        """Whether this process kills itself, rather than telling of the save that it was to."""
        while not any(r["process"] == which and r["event"] == "again" for r in self.reports):
            pid, status = os.waitpid(self._pids[which], os.WNOHANG)
            if pid:
                self._pids.pop(which)
                assert os.WIFSIGNALED(status), self.reports[-4:]
                return True
            if select.select([self._pipe], [], [], 0.005)[0]:
                self._read(0.0)
        return False

    def end(self) -> None:
        self.kill()
        while self._read(5.0):
            pass
        for pid in self._pids:
            os.waitpid(pid, 0)
        os.close(self._pipe)
        self._store.cleanup()

    def values(self, event: str) -> list[Any]:
        return [report["value"] for report in self.reports if report["event"] == event]

    def _read(self, seconds: float) -> bool:
        if not select.select([self._pipe], [], [], seconds)[0]:
            raise TimeoutError(f"{self.orders}: no word; so far {self.reports[-4:]}")
        data = os.read(self._pipe, 1 << 16)
        *lines, self._unread = (self._unread + data).split(b"\n")
        self.reports += [json.loads(line) for line in lines]
        return bool(data)


class Rounds:
    """What has been found so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.phases: Counter[str] = Counter()
        self.faults: list[str] = []
        self.newest = 0
        self.survivors: list[str] = []

    def examine(self, round_: Round) -> None:
        """Looks at the folder after a kill, and at what the job has told before it."""
        fault = self._fault(round_)
        phase = phase_of(self.folder)
        self.phases[phase] += 1
        if fault:
            self.faults.append(f"{round_.orders}, {phase}: {fault}; {names_in(self.folder)}")

    def _fault(self, round_: Round) -> str:
        for loaded in round_.values("loaded"):
            if loaded["step"] != self.newest or loaded["passed_over"] or loaded["leftovers"]:
                return f"loaded {loaded}, and step {self.newest} was there"
        unexpected = [word for word in round_.values("failed") if not word.startswith("NoAnswer")]
        if unexpected:
            return unexpected[0]
        complete = checkpoints_in(self.folder)
        for path in complete:
            try:
                verified_index(path, Communicator(None))
            except CheckpointError as error:
                return str(error)
        self.newest = step_of(complete[-1]) if complete else 0
        saved, again = max(round_.values("complete"), default=0), round_.values("again")
        if again and self.newest != again[0]:
            return f"step {again[0]} had been complete, again"
        if not again and self.newest < saved - STEP * round_.orders.again:
            return f"step {saved} had been complete"
        latest = self.folder / "latest"
        if len(complete) > 1 and not latest.exists():
            return "no latest"
        if latest.exists() and latest.read_text().strip() not in [path.name for path in complete]:
            return f"latest is {latest.read_text()}"
        return ""


def phase_of(folder: Path) -> str:
    """What a save was doing, by the files that it has left."""
    names = names_in(folder)
    for partial in names:
        if partial.startswith(".step-") and partial.endswith(".partial"):
            files = os.listdir(folder / partial)
            if INDEX_NAME in files:
                return "complete, without its name"
            return "index" if f".{INDEX_NAME}.partial" in files else "tensors"
    if any(name.endswith(".removed") for name in names):
        return "removing"
    complete = [path.name for path in checkpoints_in(folder)] if folder.exists() else []
    latest = folder / "latest"
    if complete and (not latest.exists() or latest.read_text().strip() != complete[-1]):
        return "not the latest yet"
    if any(name.endswith(".replaced") for name in complete):
        return "replaced"
    return "to be removed" if len(complete) > KEEP else "between saves"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[5:13])


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


def kill_at_random(rounds: Rounds, number: int, chance: random.Random) -> None:
    processes = chance.choice((2, 2, 3))
    round_ = Round(Orders(rounds.folder, processes, background=number % 2 == 0))
    began = time.monotonic()
    # two saves that are complete on all, to know how long one takes
    if round_.follow("complete", processes):
        began = time.monotonic()
        round_.follow("complete", 3 * processes)
        time.sleep(chance.uniform(0, 1.5) * (time.monotonic() - began) / 2)
    survive = number < SURVIVORS
    if survive or chance.random() < 0.5:
        round_.kill(chance.randrange(processes))
        if survive:
            round_.follow("failed", processes - 1)
            rounds.survivors += round_.values("failed")
        else:
            time.sleep(0.01)
    round_.end()
    rounds.examine(round_)


def kill_everywhere(rounds: Rounds, process: int, background: bool, again: int) -> int:
    """Kills one process before each of its calls to the system in a save; how many these are."""
    for call in itertools.count(1):
        orders = Orders(rounds.folder, 2, background, 2, again, suicide=(process, call))
        round_ = Round(orders)
        round_.follow("complete", 6)
        gone = round_.wait_for(process)
        round_.end()
        rounds.examine(round_)
        if not gone or rounds.faults:
            return call - 1
    raise AssertionError("there is always a last call")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("random", "exact"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phases", type=int, default=0, help="so many of --hit are to be hit")
    parser.add_argument("--hit", nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warm_up()
    chance = random.Random(options.seed)
    rounds = Rounds(options.folder)
    began = time.monotonic()
    calls = []
    if options.kind == "random":
        for number in range(MORE_KILLS):
            hit = rounds.phases.keys() & set(options.hit)
            if number >= RANDOM_KILLS and len(hit) >= options.phases:
                break
            kill_at_random(rounds, number, chance)
    else:
        for process, background, again in ((0, True, 1), (0, False, 0), (1, True, 0)):
            calls.append(kill_everywhere(rounds, process, background, again))
    results = {
        "phases": rounds.phases,
        "faults": rounds.faults,
        "calls": calls,
        "survivors": rounds.survivors,
        "newest": rounds.newest,
        "seconds": time.monotonic() - began,
    }
    options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
