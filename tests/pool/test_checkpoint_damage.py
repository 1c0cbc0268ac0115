"""A checkpoint that is broken, or another model's, is refused with its file's name, everywhere."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from checkpoint_jobs import (
    SHAPES,
    Snapshot,
    build,
    load_auto,
    load_one,
    same,
    save_three,
    snapshot,
    step,
    told,
)

from arg_dist.checkpoint import Checkpoints, load
from arg_dist.checkpoint.index import (
    INDEX_NAME,
    SCHEMA_VERSION,
    CheckpointError,
    read_index,
)

PROCESSES = 3


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory) -> Path:
    """Three checkpoints of three processes."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    pool.run(save_three, PROCESSES, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of them, to be damaged."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def tensors(checkpoint: Path) -> Path:
    return checkpoint / f"process-00001-of-{PROCESSES:05d}.safetensors"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << 4
    path.write_bytes(content)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


LATER = {"schema_version": SCHEMA_VERSION + 1, "written_by": "arg_dist 9.9"}
BY_LATER = "version {schema_version} by {written_by}".format(**LATER)


def come_from_the_future(path: Path) -> None:
    envelope = json.loads(path.read_text())
    path.write_text(json.dumps({**envelope, **LATER}))


def replace_by_older(path: Path) -> None:
    shutil.copy(path.parents[1] / "step-00000001" / path.name, path)


DAMAGES = {
    "truncated": (tensors, shorten, "bytes where"),
    "longer": (tensors, lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes where"),
    "a bit of a tensor": (tensors, lambda path: flip(path, -5), "sha256"),
    "a bit of the header": (tensors, lambda path: flip(path, 20), "sha256"),
    "another save's": (tensors, replace_by_older, "sha256"),
    "missing": (tensors, Path.unlink, "missing"),
    "index: a bit": (lambda c: c / INDEX_NAME, lambda path: flip(path, 400), "damaged"),
    "index: truncated": (lambda c: c / INDEX_NAME, shorten, "damaged"),
    "index: empty": (lambda c: c / INDEX_NAME, lambda path: path.write_bytes(b""), "damaged"),
    "index: of something else": (lambda c: c / INDEX_NAME, lambda p: p.write_text("[]"), "not the"),
    "index: later version": (lambda c: c / INDEX_NAME, come_from_the_future, BY_LATER),
    "index: missing": (lambda c: c, lambda path: (path / INDEX_NAME).unlink(), "no index.json"),
}


def test_whoever_may_read_the_folder_may_read_what_is_in_it(saved):
    checkpoint = saved / "step-00000003"
    modes = {path.stat().st_mode & 0o777 for path in checkpoint.iterdir()}
    assert modes == {checkpoint.stat().st_mode & 0o666}


def load_damaged(group: Any, folder: Path) -> tuple[str, Any, Snapshot]:
    """What is said of the newest one; what `auto` loads instead; and everything after that."""
    optimizer = build(group)
    before = snapshot(optimizer)
    checkpoints = Checkpoints(folder, optimizer)
    words = told(lambda: checkpoints.load(folder / "step-00000003"))
    assert same(before, snapshot(optimizer))
    return words, checkpoints.load(), snapshot(optimizer)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_loaded(pool, folder, damage):
    path_in, damaged, words = DAMAGES[damage]
    path = path_in(folder / "step-00000003")
    damaged(path)
    expected = pool.run(load_one, 2, folder / "step-00000002")
    for (said, restored, found), before in zip(
        pool.run(load_damaged, 2, folder), expected, strict=True
    ):
        assert str(path) in said and words in said and ("use" in said or "give" in said)
        assert restored.step == 2 and restored.path == folder / "step-00000002"
        assert restored.passed_over == [said]
        assert same(found, before)


def test_where_none_is_intact_all_of_them_are_told(pool, folder):
    shorten(tensors(folder / "step-00000001"))
    (folder / "step-00000002" / INDEX_NAME).unlink()
    flip(tensors(folder / "step-00000003"), -1)
    for words in pool.run(load_auto, 2, folder):
        assert str(folder) in words
        assert all(f"step-0000000{i}" in words for i in (1, 2, 3))
        assert all(word in words for word in ("bytes where", "no index.json", "sha256"))


def test_where_there_is_none_nothing_is_loaded(pool, tmp_path):
    assert pool.run(load_auto, 2, tmp_path / "nothing") == [None, None]


def test_a_flipped_bit_of_an_index_is_noticed_or_means_nothing(folder):
    checkpoint = folder / "step-00000003"
    path = checkpoint / INDEX_NAME
    content, index = path.read_bytes(), read_index(checkpoint)
    chance = random.Random(0)
    unnoticed = 0
    for position in chance.sample(range(len(content)), 800):
        damaged = bytearray(content)
        damaged[position] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            assert read_index(checkpoint) == index
            unnoticed += 1
        except CheckpointError as error:
            assert str(path) in str(error)
    assert unnoticed < 20, "only the name of the software that wrote it is not covered"


OTHERS = {
    "names": ({"names": "abce"}, ["has no 'd'", "another model"]),
    "shapes": ({"shapes": [(24, 17), *SHAPES[1:]]}, ["a has the shape (24, 17)", "(24, 16)"]),
    "fewer": ({"shapes": SHAPES[:3], "names": "abc"}, ["has no 'd'", "another model"]),
    "low_rank": ({"low_rank": False}, ["full-rank Adam", "low_rank"]),
}


def load_into_another(group: Any, checkpoint: Path, difference: dict[str, Any]) -> str:
    optimizer = build(group, **difference)
    step(optimizer, 7)
    before = snapshot(optimizer)
    words = told(lambda: load(checkpoint, optimizer))
    assert same(before, snapshot(optimizer))
    step(optimizer, 8)
    return words


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_model_changes_nothing(pool, saved, other):
    difference, words = OTHERS[other]
    for said in pool.run(load_into_another, 2, saved / "step-00000003", difference):
        assert str(saved / "step-00000003") in said
        assert all(word in said for word in words), said


def load_with_other_settings(group: Any, checkpoint: Path) -> tuple[list[str], Snapshot]:
    optimizer = build(group, side="left", energy=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(checkpoint, optimizer)
    return [str(warning.message) for warning in caught], snapshot(optimizer)


def test_settings_are_those_of_the_checkpoint_and_a_warning_says_so(pool, saved):
    checkpoint = saved / "step-00000003"
    results = pool.run(load_with_other_settings, 2, checkpoint)
    for (_, found), expected in zip(results, pool.run(load_one, 2, checkpoint), strict=True):
        assert same(found, expected)
    [words] = [warned for warned in results[0][0] if "instead of" in warned]
    assert "side='auto' instead of 'left'" in words and "energy=0.65 instead of 0.5" in words


def load_from_own(group: Any, folder: Path) -> str:
    optimizer = build(group)
    return told(lambda: load(folder / str(dist.get_rank(group)) / "newest", optimizer))


def test_two_checkpoints_under_one_name_are_not_mixed(pool, saved, tmp_path):
    for process, number in ((0, 2), (1, 3)):
        shutil.copytree(saved / f"step-0000000{number}", tmp_path / str(process) / "newest")
    for words in pool.run(load_from_own, 2, tmp_path):
        assert "process 1 finds another checkpoint" in words and "share" in words
