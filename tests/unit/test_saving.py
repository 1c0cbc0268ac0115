"""What a run does with its checkpoints, where the disk fails and where training does."""

from __future__ import annotations

import datetime
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from arg_dist import AdaRankGrad, NoAnswerError
from arg_dist.checkpoint import CheckpointError, Restored, SaveTimes
from arg_dist.cli.parsing import InputError
from launchers.pretraining import processes, saving
from launchers.pretraining.processes import limit_waiting, no_answer
from launchers.pretraining.resuming import CheckpointPlan
from launchers.pretraining.saving import RunCheckpoints
from launchers.reporting import Earlier

pytestmark = pytest.mark.unit

PROGRESS = {"last_line": {"step": 4}, "seconds": 2.0, "parts": []}


class Series:
    """A series of checkpoints in which saves fail on order."""

    def __init__(self, folder, optimizer, **settings):
        self.folder, self.settings = folder, settings
        self.times, self.saved, self.pending = [], [], None
        self.failing = set()
        self.restored = None

    def save(self, step, job):
        self.wait()
        self.saved.append((step, job))
        self.pending = len(self.saved), step

    def wait(self):
        pending, self.pending = self.pending, None
        if pending is not None:
            number, step = pending
            if number in self.failing:
                raise CheckpointError(f"disk full at {step}")
            self.times.append(SaveTimes(step, 0.25, 1.5, 3 * 2**20))

    def load(self, which):
        if isinstance(self.restored, Exception):
            raise self.restored
        if self.restored is not None:
            warnings.warn("goes on with energy=0.9 instead of 0.8", stacklevel=1)
        return self.restored


class FakeEngine(SimpleNamespace):
    def __init__(self):
        weight = torch.nn.Parameter(torch.zeros(4, 4))
        peaks = []
        super().__init__(
            optimizer=AdaRankGrad([weight]),
            model=torch.nn.Linear(1, 1),
            scheduler=SimpleNamespace(set_peak=peaks.append),
            peaks=peaks,
            extra={},
        )

    def extra_state(self):
        return {"loss_scale": 8}

    def load_extra_state(self, state):
        self.extra = state


@pytest.fixture
def run(monkeypatch, tmp_path):
    def build(**plan):
        plan = {"resume": None, "every": 4} | plan
        engine = FakeEngine()
        checkpoints = RunCheckpoints(
            CheckpointPlan(tmp_path / "checkpoints", **plan), engine, {"program": "x"}
        )
        return checkpoints, checkpoints._series, engine

    monkeypatch.setattr(saving, "Checkpoints", Series)
    return build


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_saves_are_due_every_so_often_and_at_the_end_but_once_a_step(run):
    checkpoints, series, _ = run()
    assert [step for step in range(1, 10) if checkpoints.is_due(step, last=False)] == [4, 8]
    assert checkpoints.is_due(5, last=True)
    assert checkpoints.save(5, PROGRESS) > 0
    assert not checkpoints.is_due(5, last=True)
    job = {"program": "x", "progress": PROGRESS, "engine": {"loss_scale": 8}}
    assert series.saved == [(5, job)]
    assert not run(every=None, resume=None)[0].is_due(4, last=True)  # saves nothing
    at_the_end = run(every=None, resume="auto")[0]
    assert not at_the_end.is_due(4, last=False) and at_the_end.is_due(4, last=True)


def test_completed_saves_are_told_and_put_together(run, alone):
    checkpoints, _, _ = run()
    checkpoints.save(4, PROGRESS)
    assert checkpoints.news() == []
    checkpoints.save(8, PROGRESS)
    (told,) = checkpoints.news()
    assert told.startswith("checkpoint of step 4: stall 0.250 s, write 1.500 s, 3.0 MiB")
    saves = checkpoints.finish()
    assert [save["step"] for save in saves] == [4, 8]
    assert saves[0]["bytes"] == 3 * 2**20
    assert len(checkpoints.news()) == 1
    assert run(every=None)[0].finish() == []


def test_a_save_that_failed_is_made_good_by_the_next_one_or_ends_the_run(run):
    checkpoints, series, _ = run()
    series.failing = {1}
    checkpoints.save(4, PROGRESS)
    checkpoints.save(8, PROGRESS)
    assert [times.step for times in series.times] == [8]  # complete before training goes on
    told = checkpoints.news()
    assert "disk full at 4" in told[0] and "again at step 8" in told[0]
    series.failing = {3, 4}
    checkpoints.save(12, PROGRESS)
    with pytest.raises(CheckpointError, match="disk full at 16"):
        checkpoints.save(16, PROGRESS)


def test_a_run_goes_on_with_all_that_was_saved(run, tmp_path):
    checkpoints, series, engine = run(resume="auto")
    assert checkpoints.resume(new_peak=None) == Earlier()
    assert "starting from the beginning" in checkpoints.news()[0]
    path = tmp_path / "checkpoints" / "step-00000004"
    job = {"progress": PROGRESS, "engine": {"loss_scale": 8}}
    series.restored = Restored(path, 4, 2, job, True, ["step-8/x: damaged"])
    earlier = checkpoints.resume(new_peak=3e-3)
    assert earlier == Earlier(4, tmp_path, {"step": 4}, 2.0, [])
    assert (engine.extra, engine.peaks) == ({"loss_scale": 8}, [3e-3])
    assert checkpoints.news() == [
        "passed over: step-8/x: damaged",
        f"resumed: {path}, step 4, written by 2 processes",
        "goes on with energy=0.9 instead of 0.8",
    ]
    assert not checkpoints.is_due(4, last=True)
    # taken out of its run: no metrics.jsonl of whatever lies there
    series.restored = Restored(Path("/elsewhere/step-00000004"), 4, 1, job, True)
    assert checkpoints.resume(new_peak=None).directory == Path("/elsewhere/step-00000004")
    series.restored = CheckpointError("x: another model")
    with pytest.raises(InputError, match="--resume: x: another model"):
        checkpoints.resume(new_peak=None)
    assert run(every=None)[0].resume(new_peak=1.0) == Earlier()


def test_an_error_of_all_processes_leaves_the_last_save_whole(run):
    checkpoints, series, _ = run()
    with pytest.raises(FloatingPointError, match=r"the loss is nan$"), checkpoints:
        checkpoints.save(4, PROGRESS)
        raise FloatingPointError("the loss is nan")
    assert [times.step for times in series.times] == [4]
    series.failing = {2, 3}
    with pytest.raises(FloatingPointError, match="the loss is nan; disk full at 8"), checkpoints:
        checkpoints.save(8, PROGRESS)
        raise FloatingPointError("the loss is nan")
    with pytest.raises(RuntimeError, match="gone"), checkpoints:  # the others may never come
        checkpoints.save(12, PROGRESS)
        raise RuntimeError("gone")
    assert series.pending is not None


@pytest.mark.parametrize(
    "text",
    [
        "gloo: Timed out waiting 8000ms for recv",
        "pair.cc: Connection closed by peer [::1]",
        "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, "
        "OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600043 milliseconds before timing out.",
        "NCCL communicator was aborted on rank 1.",
        "NCCL error in: ProcessGroupNCCL.cpp:1970, remote process exited or there was a network "
        "error, NCCL version 2.21.5",
        "ncclRemoteError: A call failed possibly due to a network error",
    ],
)
def test_the_silence_of_others_is_told_in_one_line(text):
    told = no_answer(RuntimeError(text))
    assert "stopped answering" in told and "--time-limit" in told
    assert no_answer(NoAnswerError("waited for q_proj")) == "waited for q_proj"
    assert no_answer(RuntimeError("size mismatch")) is None


def test_data_reaches_the_processes_through_the_host_with_time_to_prepare_it(monkeypatch):
    seen = {}

    def send(box, src, group, device):
        assert group is made and device == torch.device("cpu")
        seen["sent"] = list(box)

    made = object()
    monkeypatch.setattr(processes, "is_first_process", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda **kept: seen.update(kept) or made)
    monkeypatch.setattr(dist, "broadcast_object_list", send)
    monkeypatch.setattr(dist, "destroy_process_group", lambda group: seen.update(gone=group))
    assert processes.from_first_process(lambda: [1, 2]) == [1, 2]
    assert seen == {"backend": "gloo", "timeout": processes.PREPARATION, "sent": [[1, 2]],
                    "gone": made}  # fmt: skip


def test_every_group_gets_the_time_limit(alone):
    second = dist.new_group([0])
    limit = datetime.timedelta(seconds=77)
    limit_waiting(limit)
    for group in (dist.group.WORLD, second):
        assert group._get_backend(torch.device("cpu")).options._timeout == limit
