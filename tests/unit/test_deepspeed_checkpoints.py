"""Where the optimizer's state of a universal checkpoint is looked for."""

from pathlib import Path

import pytest

from arg_dist.checkpoint import CheckpointError
from arg_dist.checkpoint.files import describe
from arg_dist.engines.deepspeed_checkpoints import STATE_FOLDER, _find_state

pytestmark = pytest.mark.unit


def saved(checkpoint: Path, content: str = "first") -> dict[str, str]:
    """Writes a state, and gives the note that DeepSpeed would keep of it."""
    folder = checkpoint / STATE_FOLDER
    folder.mkdir(parents=True)
    (folder / "index.json").write_text(content)
    digest = describe(folder / "index.json").sha256
    return {"folder": str(folder), "tag": checkpoint.name, "sha256": digest}


def test_it_is_found_where_it_was_written(tmp_path: Path) -> None:
    note = saved(tmp_path / "a" / "t")
    assert _find_state(tmp_path / "b" / "t_uni", note) == tmp_path / "a" / "t" / STATE_FOLDER


def test_it_is_found_beside_the_converted_one_after_both_were_moved(tmp_path: Path) -> None:
    note = saved(tmp_path / "a" / "t")
    (tmp_path / "a").rename(tmp_path / "b")
    assert _find_state(tmp_path / "b" / "t_uni", note) == tmp_path / "b" / "t" / STATE_FOLDER


def test_it_is_found_in_the_converted_one(tmp_path: Path) -> None:
    note = saved(tmp_path / "t")
    moved = tmp_path / "elsewhere" / "t_uni"
    moved.mkdir(parents=True)
    (tmp_path / "t" / STATE_FOLDER).rename(moved / STATE_FOLDER)
    assert _find_state(moved, note) == moved / STATE_FOLDER


def test_that_of_a_later_save_is_not_taken(tmp_path: Path) -> None:
    note = saved(tmp_path / "t")
    (tmp_path / "t" / STATE_FOLDER / "index.json").write_text("second")
    with pytest.raises(CheckpointError, match=r"t_uni: .*is that of a later save; copy the folder"):
        _find_state(tmp_path / "t_uni", note)


def test_without_it_the_error_says_what_to_copy(tmp_path: Path) -> None:
    note = {"folder": "/gone/t/adarankgrad", "tag": "t", "sha256": "0"}
    with pytest.raises(CheckpointError, match=r"copy the folder adarankgrad .*\(/gone/t/adarankgr"):
        _find_state(tmp_path / "t_uni", note)


def test_without_a_note_the_weights_alone_can_be_had(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="load_optimizer_states=False"):
        _find_state(tmp_path / "t_uni", None)
