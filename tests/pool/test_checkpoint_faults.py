"""What can happen while checkpoints are written: one clear error on all, and nothing lost."""

from __future__ import annotations

import logging
import logging.handlers
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from checkpoint_jobs import build, load_auto, load_one, same, snapshot, step, told

from arg_dist.checkpoint import CheckpointError, Checkpoints, files, lock, save


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """A disk that is full, for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_on_a_full_disk(
    group: Any, folder: Path, background: bool, who: int, size: int
) -> tuple[list[str], list[str], list[str]]:
    """What is said, what the log says, and what is in the folder after that."""
    optimizer = build(group)
    checkpoints = Checkpoints(folder, optimizer, background=background)
    log = logging.getLogger("arg_dist")
    handler = logging.handlers.BufferingHandler(100)
    log.addHandler(handler)
    step(optimizer, 1)
    checkpoints.save(1)
    checkpoints.wait()
    before = snapshot(optimizer)
    step(optimizer, 2)
    said = []
    job = {"long": "x" * 100_000}
    with no_file_longer_than(size) if dist.get_rank(group) == who else nullcontext():
        if background:
            checkpoints.save(2, job)
            said.append(told(lambda: checkpoints.save(3, job)))
            checkpoints.save(3, job)
            said.append(told(checkpoints.wait))
        else:
            said.append(told(lambda: checkpoints.save(2, job)))
        dist.barrier(group)
        left = sorted(os.listdir(folder))
    log.removeHandler(handler)
    restored = checkpoints.load()
    assert restored is not None and restored.step == 1 and same(snapshot(optimizer), before)
    step(optimizer, 2)
    checkpoints.save(2, job)
    checkpoints.wait()
    assert [save.step for save in checkpoints.times] == [1, 2]
    assert same(load_one(group, folder / "step-00000002"), snapshot(optimizer))
    return said, [record.getMessage() for record in handler.buffer], left


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(
    ("who", "size", "file"),
    [
        (0, 1000, "process-00000-of-00002.safetensors"),
        (1, 1000, "process-00001-of-00002.safetensors"),
        (0, 90_000, "index.json"),
    ],
)
def test_a_full_disk_is_told_to_all_and_leaves_what_was_there(
    pool, tmp_path, background, who, size, file
):
    folder = tmp_path / "checkpoints"
    results = pool.run(save_on_a_full_disk, 2, folder, background, who, size)
    for process, (said, logged, left) in enumerate(results):
        assert len(said) == (2 if background else 1)
        for i, words in enumerate(said):
            assert f"process {who}: {folder}/.step-0000000{i + 2}.partial/{file}: cannot" in words
            assert "free disk space" in words and "earlier checkpoints are unchanged" in words
        assert len(logged) == (len(said) if background and process == 0 else 0)
        assert left == [".claim", "latest", "step-00000001"]


def save_with_an_unforeseen_error(group: Any, folder: Path) -> tuple[str, bool]:
    """What is said, and whether its cause is known."""
    optimizer = build(group)
    checkpoints = Checkpoints(folder, optimizer)
    step(optimizer, 1)
    usual = files.save_file

    def fail(*_: Any) -> None:
        raise ValueError("nobody has thought of this")

    files.save_file = fail if dist.get_rank(group) == 1 else usual
    try:
        checkpoints.save(1)
        with pytest.raises(CheckpointError) as raised:
            checkpoints.wait()
    finally:
        files.save_file = usual
    return str(raised.value), isinstance(raised.value.__cause__, ValueError)


def test_an_unforeseen_error_on_one_process_keeps_nobody_waiting(pool, tmp_path):
    folder = tmp_path / "checkpoints"
    results = pool.run(save_with_an_unforeseen_error, 3, folder, seconds=15)
    for process, (words, is_cause) in enumerate(results):
        assert words == "process 1: ValueError: nobody has thought of this"
        assert is_cause == (process == 1)
    assert sorted(os.listdir(folder)) == [".claim"]


def save_what_cannot_be_read_back(group: Any, folder: Path) -> list[str]:
    """What is said of an object that one process passes: as data of the job, in a scheduler."""
    optimizer, own = build(group), object() if dist.get_rank(group) == 1 else 1
    scheduler = SimpleNamespace(state_dict=lambda: {"rules": [own]})
    return [
        told(lambda: Checkpoints(folder, optimizer).save(1, {"seen": {3: own}})),
        told(lambda: Checkpoints(folder, optimizer, scheduler=scheduler)),
    ]


def test_what_cannot_be_read_back_is_refused_everywhere(pool, tmp_path):
    folder = tmp_path / "checkpoints"
    for words in pool.run(save_what_cannot_be_read_back, 3, folder, seconds=15):
        assert words[0].startswith("process 1: job.seen[3]: got a value of type object, ")
        assert words[1].startswith("process 1: scheduler.rules[0]: got a value of type object, ")
    assert os.listdir(folder) == [".claim"]


def save_here(group: Any, folder: Path, each_its_own: bool) -> tuple[str, str]:
    """What a series and a single save say of a folder."""
    own = folder / str(dist.get_rank(group)) if each_its_own else folder
    optimizer = build(group)
    step(optimizer, 1)
    return told(lambda: Checkpoints(own, optimizer)), told(lambda: save(own / "one", optimizer))


def test_a_folder_that_cannot_be_written_is_told_at_the_start(pool, tmp_path):
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "checkpoints"
    for words in pool.run(save_here, 2, folder, False):
        assert all(str(folder) in each and "cannot be written" in each for each in words)


def test_a_folder_that_is_not_shared_is_told_at_the_start(pool, tmp_path):
    for series, single in pool.run(save_here, 2, tmp_path, True):
        assert "process 1" in series and "all processes share" in series
        assert "process 1" in single and "all processes share" in single
    assert os.listdir(tmp_path / "0") == [".claim"] and not (tmp_path / "1").exists()


def test_a_folder_belongs_to_one_job_at_a_time(pool, tmp_path):
    folder = tmp_path / "checkpoints"
    mine = Checkpoints(folder, build(None))
    again = Checkpoints(folder, build(None))
    for words in pool.run(claim_taken, 2, folder):
        assert str(folder) in words and "another job" in words and f"process {os.getpid()}" in words
    child = os.fork()  # as loaders of data are, which may live longer than the job
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        del mine
        assert pool.run(claim_taken, 2, folder)[0]
        del again
        assert pool.run(load_auto, 2, folder) == [None, None]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def claim_taken(group: Any, folder: Path) -> str:
    usual = lock.WAIT_SECONDS
    lock.WAIT_SECONDS = 0.2
    try:
        return told(lambda: Checkpoints(folder, build(group)))
    finally:
        lock.WAIT_SECONDS = usual


def go_back_and_forth(group: Any, folder: Path) -> list[Any]:
    """What is in the folder, and the latest, after each of these."""
    optimizer = build(group)
    seen: list[Any] = []

    def after(*numbers: int) -> None:
        for number in numbers:
            step(optimizer, number)
            checkpoints.save(number, {"branch": len(seen)})
        checkpoints.wait()
        dist.barrier(group)
        names = sorted(name.removeprefix("step-000000") for name in os.listdir(folder))
        restored = checkpoints.load()
        assert restored is not None and restored.passed_over == []
        found = {"names": names[1:], "latest": (folder / "latest").read_text(), **restored.job}
        seen.append({**found, "step": restored.step})
        dist.barrier(group)

    checkpoints = Checkpoints(folder, optimizer, keep=2)
    after(10, 20, 30)
    checkpoints.load(folder / "step-00000020")
    after(25)
    after(30)
    after(30)
    checkpoints.load(folder / "step-00000025")
    after(27, 40)
    return seen


def test_the_last_ones_are_kept_and_a_run_can_go_back(pool, tmp_path):
    expected = [
        (["20", "30", "latest"], 30),
        (["20", "25", "30.abandoned", "latest"], 25),
        (["25", "30", "latest"], 30),
        (["25", "30", "latest"], 30),
        (["27", "40", "latest"], 40),
    ]
    for seen in pool.run(go_back_and_forth, 2, tmp_path / "checkpoints"):
        for branch, (found, (names, newest)) in enumerate(zip(seen, expected, strict=True)):
            latest = f"step-000000{newest}\n"
            assert found == {"names": names, "latest": latest, "branch": branch, "step": newest}
