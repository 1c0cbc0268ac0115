"""The small job that hosts run, and the same on one host."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hosts.hosts import Node
from tests.hosts.namespaces import Host
from tests.launch.launching import ROOT, launch
from tests.launch.stopping import metrics
from tests.launch.tiny_jobs import llama_config, write_text
from tests.tolerances import LOSSES

SCRIPT = str(ROOT / "launchers/train_lm.py")
STEPS = 20
TIME_LIMIT = 8
"""Seconds that a process waits for another; steps take a tenth of one, also on a busy machine."""
SETTINGS = ("max_rank=12", "min_rank=2", "energy=0.7", "max_gap=6", "min_gap=3", "weight_decay=0")
LINK = 40e6
"""Bits per second at which a step takes a quarter of a second: time to catch it in the middle."""


@dataclass(frozen=True)
class SmallJob:
    """A tiny Llama that trains for :data:`STEPS` steps; `words` are the options of all runs."""

    text: Path
    model: Path
    words: tuple[object, ...]

    @classmethod
    def make(cls, folder: Path) -> SmallJob:
        text, model = folder / "text", folder / "model"
        text.mkdir()
        write_text(text)
        llama_config().save_pretrained(model)
        data = ("--data", text, "--model", model, "--steps", STEPS, "--time-limit", TIME_LIMIT)
        sizes = ("--seq-len", 32, "--batch-size", 12, "--warmup", 4, "--lr", 2e-3)
        rare = ("--eval-every", STEPS, "--eval-batches", 1)
        return cls(
            text, model, (*data, *sizes, *rare, *(f"--set={setting}" for setting in SETTINGS))
        )

    def on_one_host(self, out: Path, *, processes: int) -> list[dict[str, Any]]:
        """Trains with ZeRO-2 and without cluster or launcher; the steps' lines."""
        words = (*zero(2), *self.words, "--out", out)
        finished = launch(SCRIPT, *words, processes=processes, seconds=200, launcher="forked")
        assert finished.returncode == 0, finished.stderr[-3000:]
        return metrics(out)


def zero(stage: int) -> tuple[object, ...]:
    return "--deepspeed_config", f"ds_configs/zero{stage}.json"


def node(
    members: Sequence[Host],
    number: int,
    log: Path,
    *job: object,
    options: Sequence[object] = (),
    script: str = SCRIPT,
    variables: Mapping[str, str] | None = None,
    folder: Path = ROOT,
) -> Node:
    """Starts node `number` of a job, which lies on as many `members`, as its user does.

    Args:
        members: the hosts; the first one is node 0.
        number: of the node.
        log: a new file for what it prints.
        job: arguments of the script.
        options: of ``launchers.cluster``.
        script: the job.
        variables: set in place of, or beside, those that say which node it is.
        folder: where it works.
    """
    place = {
        "NNODES": str(len(members)),
        "NODE_RANK": str(number),
        "MASTER_ADDR": members[0].address,
        "START_TIMEOUT": "100",
    }
    words = (sys.executable, "-m", "launchers.cluster", *options, script, *job)
    everything = {**place, **(variables or {})}
    return Node(members[number], words, log, variables=everything, folder=folder)


def same_losses(lines: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    """Asserts that a run took the first of the expected steps, with their ranks and losses."""
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    for line, other in zip(lines, expected, strict=False):
        LOSSES.check(line["loss"], other["loss"])
        assert line.get("ranks") == other.get("ranks")
        if "held_out_loss" in line:
            LOSSES.check(line["held_out_loss"], other["held_out_loss"])
