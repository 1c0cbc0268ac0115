"""State in checkpoints that merge all processes by key: what does not fit is refused on all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from travelling_jobs import SAVED_AFTER, SETTINGS, WAYS, Job, by_dcp, by_full, from_dcp, start

import arg_dist


def save(group: Any, engine: str, way: str, folder: Path, **settings: Any) -> None:
    job = start(group, engine, folder, **settings)
    job.train(0, 3)
    job.set_turn(None)
    WAYS[way][0](job, folder / "saved")
    dist.barrier(group)


def told(job: Job, way: str) -> str:
    """The error on loading, or nothing; the optimizer goes on as before."""
    job.set_turn(None)
    before = job.states()
    try:
        WAYS[way][1](job, job.folder / "saved")
    except BaseException as error:  # DCP's own is no Exception
        assert job.states().keys() == before.keys()
        return f"{type(error).__name__}: {error}"
    return ""


def load(group: Any, engine: str, way: str, folder: Path, settings: dict[str, Any]) -> str:
    return told(start(group, engine, folder, **settings), way)


@pytest.mark.parametrize("engine", ["DDP", "ROWS"])
@pytest.mark.parametrize(
    ("way", "settings", "words"),
    [
        ("DCP", {}, "0.weight.process 0 of 4 to process 3 of 4, rank up to 4"),
        ("DCP, full", {}, "no state of process {} of 4 was saved, but of process 0 of 2"),
        ("DCP, full, broadcast", {}, "no state of process {} of 4 was saved, but of process 0 of"),
    ],
)
def test_another_number_of_processes_is_an_error_on_all(
    pool, tmp_path, engine, way, settings, words
):
    pool.run(save, 2, engine, way, tmp_path, seconds=60)
    for i, message in enumerate(pool.run(load, 4, engine, way, tmp_path, settings, seconds=60)):
        assert words.format(i) in message


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("DCP", "Missing key in checkpoint state_dict: optimizer.state.0.weight.0.weight.proc"),
        ("DCP, full", "saved with another max_rank"),
        ("DCP, full, broadcast", "saved with another max_rank"),
    ],
)
def test_another_largest_rank_is_an_error_on_all(pool, tmp_path, way, words):
    pool.run(save, 4, "ROWS", way, tmp_path, seconds=60)
    for message in pool.run(load, 4, "ROWS", way, tmp_path, {"max_rank": 5}, seconds=60):
        assert words in message
        assert way != "DCP" or "rank up to 5" in message


def in_groups(job: Job, count: int) -> None:
    """Builds the optimizer of the first layers, each in a group of its own, as they are added."""
    named = [
        {"params": [(f"{i}.{name}", parameter) for name, parameter in layer.named_parameters()]}
        for i, layer in enumerate(job.model)
    ]
    job.optimizer = arg_dist.AdaRankGrad(named[:count], process_group=None, **SETTINGS)


def group_not_yet_there(group: Any, way: str, folder: Path) -> str:
    """The last layer is in the optimizer when it is saved, and not yet when it is loaded."""
    first, second = start(group, "ALONE", folder), start(group, "ALONE", folder)
    in_groups(first, 3)
    in_groups(second, 2)
    first.train(0, SAVED_AFTER)
    first.set_turn(None)
    WAYS[way][0](first, folder / "saved")
    return told(second, way)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("torch.save", "ConfigError: load_state_dict: the saved state has parameter '2.weight'"),
        ("checkpoint.save", "the model has no '2.bias' (nor 1 others)"),
        ("DCP", "that of 7 arrived. Build the optimizer with all parameters that it had when"),
        ("DCP, flat", "that of 7 arrived. Build the optimizer with all parameters"),
        ("DCP, full", "that of 7 arrived. Build the optimizer with all parameters"),
    ],
)
def test_state_of_a_group_that_is_added_later_is_not_dropped(pool, tmp_path, way, words):
    for message in pool.run(group_not_yet_there, 1, way, tmp_path, seconds=60):
        assert words in message


def save_after_less_was_allowed(group: Any, folder: Path) -> str:
    job = start(group, "ROWS", folder, energy=0.99)
    job.train(0, 2)
    job.optimizer.param_groups[0]["max_rank"] = 1
    try:
        by_dcp(job, folder / "saved")
    except arg_dist.ConfigError as error:
        return str(error)
    return ""


def test_a_state_with_more_than_the_largest_rank_is_refused_when_saved(pool, tmp_path):
    for message in pool.run(save_after_less_was_allowed, 2, tmp_path):
        assert "state_dict: the state of 0.weight takes" in message
        assert "(rank 4), and" in message and "for ranks up to 1" in message


def save_what_another_process_saved(group: Any, engine: str, way: str, folder: Path) -> str:
    """Each process loads the first one's state, and saves before it has taken a step."""
    me, processes = dist.get_rank(group), dist.get_world_size(group)
    job = start(group, engine, folder)
    job.train(0, 3)
    job.optimizer.consolidate_state_dict()
    state = [job.optimizer.state_dict()] if engine == "DDP" else [None]
    state = [{**state[0], "process": (0, processes)}] if state[0] else state
    dist.broadcast_object_list(state, group=group, group_src=0)
    job.optimizer.load_state_dict(state[0])
    assert me < processes
    try:
        WAYS[way][0](job, folder / "saved")
    except (RuntimeError, arg_dist.checkpoint.CheckpointError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("way", ["torch.save", "checkpoint.save"])
def test_state_of_another_process_is_not_saved_as_ones_own(pool, tmp_path, way):
    for message in pool.run(save_what_another_process_saved, 2, "DDP", way, tmp_path):
        assert "the optimizer's state was loaded on process" in message


# -- the form of earlier versions ------------------------------------------------------------------


def in_bytes(job: Job) -> dict[str, Any]:
    """What earlier versions wrote: bytes of each process under its own key."""
    me, processes = dist.get_rank(job.group), dist.get_world_size(job.group)
    saved = torch.optim.Optimizer.state_dict(job.optimizer)
    names = saved["param_groups"][0]["param_names"]
    for index, parameter in enumerate(job.model.parameters()):
        buffer = io.BytesIO()
        units = dict(job.optimizer.state[parameter])
        content = {"process": (me, processes), "calls": job.optimizer.calls, "units": units}
        torch.save(content, buffer)
        key = f"process {me} of {processes}"
        saved["state"][index] = {key: buffer.getvalue(), "form": torch.ones(1)}
    saved["state"] = {names[i]: entry for i, entry in saved["state"].items()}
    saved["param_groups"][0]["params"] = names
    return {"state": saved["state"], "param_groups": saved["param_groups"]}


def go_on_from_bytes(group: Any, way: str, folder: Path) -> str:
    first, second = start(group, "ROWS", folder), start(group, "ROWS", folder)
    first.train(0, SAVED_AFTER)
    second.put_back(first.weights())
    first.set_turn(None)
    saved = in_bytes(first)
    if way == "files":
        second.optimizer.load_state_dict(saved)
    elif way == "one file":
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, saved, group=group)
        for other in everyone:
            for name, entry in other["state"].items():
                saved["state"][name] = {**saved["state"][name], **entry}
        second.optimizer.load_state_dict(saved)
    else:
        import torch.distributed.checkpoint as dcp

        dcp.save({"optimizer": saved}, checkpoint_id=folder / "saved", process_group=group)
        second.optimizer.expects_bytes = way == "DCP, expected"
        try:
            from_dcp(second, folder / "saved")
        except BaseException as error:
            return str(error)
    first.train(SAVED_AFTER, SAVED_AFTER + 5)
    second.train(SAVED_AFTER, SAVED_AFTER + 5)
    assert all(map(torch.equal, first.weights(), second.weights()))
    by_full(second, folder / "again")  # in today's form
    assert not second.optimizer.expects_bytes
    return ""


@pytest.mark.parametrize("way", ["files", "one file", "DCP, expected", "DCP"])
def test_state_in_the_form_of_earlier_versions_is_loaded(pool, tmp_path, way):
    for message in pool.run(go_on_from_bytes, 2, way, tmp_path):
        if way == "DCP":
            assert "Missing key in checkpoint state_dict: optimizer.state." in message
        else:
            assert message == ""
