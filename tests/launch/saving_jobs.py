"""Forked jobs that save again and again, in which a process can be made to kill itself.

What is saved tells its step: every weight and moment is a function of it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import arg_dist
from arg_dist.checkpoint import Checkpoints

MATRICES, SIDE = 4, 512
STEP = 10
KEEP = 2
PROCESS_SECONDS = 60
"""A process that lives longer is ended by its alarm."""
CALLS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod"}
"""Audit events of the calls that make, change or remove files, beside fsync."""
ALL_SAVES = 10**6


@dataclass(frozen=True)
class Orders:
    """What a job does.

    Attributes:
        folder: of its checkpoints.
        processes: how many.
        background: write in a thread.
        saves: how many; then the job ends.
        again: after these a step is saved again: 0 for the last one, 1 for the one before it.
        suicide: process, and before which of its calls to the system it kills itself in that save.
    """

    folder: Path
    processes: int
    background: bool
    saves: int = ALL_SAVES
    again: int = 0
    suicide: tuple[int, int] | None = None


class Bomb:
    """Kills this process before a call to the system; until then it counts."""

    def __init__(self) -> None:
        self.calls = 0
        self._last = 0
        self._fsync = os.fsync
        os.fsync = self._counted_fsync
        sys.addaudithook(self._hear)

    def arm(self, call: int) -> None:
        self.calls, self._last = 0, call

    def disarm(self) -> None:
        self._last = 0

    def _hear(self, event: str, arguments: Any) -> None:
        if self._last and event in CALLS:
            self._count()

    def _counted_fsync(self, descriptor: int) -> None:
        if self._last:
            self._count()
        self._fsync(descriptor)

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


def start(orders: Orders, store: Path) -> tuple[list[int], int]:
    """Forks the processes of a job.

    Returns:
        Their ids, and where they report: a line of JSON each time.
    """
    ours, theirs = os.pipe()
    pids = []
    for me in range(orders.processes):
        pid = os.fork()
        if pid == 0:
            signal.alarm(PROCESS_SECONDS)
            os.close(ours)
            try:
                for event, value in _job(me, orders, store):
                    _report(theirs, me, event, value)
            except BaseException as error:
                _report(theirs, me, "failed", f"{type(error).__name__}: {error}")
            finally:
                os._exit(0)
        pids.append(pid)
    os.close(theirs)
    return pids, ours


def warm_up() -> None:
    """What a first step imports, and compiles, is there before the processes are forked."""
    optimizer_with_state(None)


def _job(me: int, orders: Orders, store: Path) -> Iterator[tuple[str, Any]]:
    bomb = Bomb() if orders.suicide is not None else None
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), orders.processes),
        rank=me,
        world_size=orders.processes,
    )
    optimizer = optimizer_with_state("world")
    checkpoints = Checkpoints(
        orders.folder, optimizer, keep=KEEP, background=orders.background, time_limit=20
    )
    left = [name for name in os.listdir(orders.folder) if name.endswith((".partial", ".removed"))]
    restored = checkpoints.load()
    step = 0 if restored is None else restored.step
    if restored is not None:
        assert restored.job["step"] == step, restored
        for name, tensor in _saved_tensors(optimizer):
            assert (tensor == _value(restored.job["number"], name, tensor)).all(), (
                f"{name} in {restored}"
            )
    passed_over = [] if restored is None else restored.passed_over
    yield "loaded", {"step": step, "leftovers": left, "passed_over": passed_over}

    def save(step: int, number: int) -> None:
        for name, tensor in _saved_tensors(optimizer):
            tensor.fill_(_value(number, name, tensor))
        checkpoints.save(step, {"step": step, "number": number})

    for count in range(1, orders.saves + 1):
        save(step + STEP * count, step + STEP * count)
        yield "complete", checkpoints.times[-1].step if checkpoints.times else 0
    checkpoints.wait()
    yield "complete", checkpoints.times[-1].step
    if bomb is not None and orders.suicide is not None:
        # that step's checkpoint is replaced, and a newer one is abandoned
        last = step + STEP * (orders.saves - orders.again)
        if me == orders.suicide[0]:
            bomb.arm(orders.suicide[1])
        save(last, last + 1)
        checkpoints.wait()
        bomb.disarm()
        yield "again", last


def optimizer_with_state(group: Any) -> arg_dist.AdaRankGrad:
    """An optimizer with state."""
    named = [(f"w{i}", nn.Parameter(torch.zeros(SIDE, SIDE))) for i in range(MATRICES)]
    optimizer = arg_dist.AdaRankGrad(
        named,
        process_group=group,
        preset="pretraining",
        max_rank=8,
        oversample=2,
        power_passes=0,
        polar_steps=1,  # the step takes its time in each of hundreds of processes
    )
    ones = torch.ones(SIDE, 2)
    for _, parameter in named:
        parameter.grad = ones @ ones.T
    optimizer.step()
    return optimizer


def _saved_tensors(optimizer: arg_dist.AdaRankGrad) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            yield name, parameter.detach()
            for key, value in optimizer.state[parameter].get(name, {}).items():
                if isinstance(value, Tensor) and key != "kept_sq":  # a sum over the processes
                    yield f"{name}.{key}", value


def _value(number: int, name: str, tensor: Tensor) -> int:
    value = 100 * number + sum(map(ord, name)) % 97  # exact in fp32
    return value if tensor.dtype == torch.float32 else value % 251  # in bytes, and in bf16


def _report(descriptor: int, me: int, event: str, value: Any) -> None:
    line = json.dumps({"process": me, "event": event, "value": value})
    os.write(descriptor, f"{line}\n".encode())
