"""What goes into DeepSpeed's checkpoints, and where it is looked for after they were converted."""

from pathlib import Path
from typing import Any

import pytest
import torch

import arg_dist
from arg_dist.checkpoint import CheckpointError
from arg_dist.checkpoint.files import describe
from arg_dist.engines.deepspeed_checkpoints import (
    NOTE,
    STATE_FOLDER,
    _find_state,
    follow_checkpoints,
)

pytestmark = pytest.mark.unit


class Engine:
    """What is asked of DeepSpeed's."""

    global_steps = 7

    def __init__(self, *, stage: int = 2, round_robin: bool = False, local: bool = False) -> None:
        self.stage, self.round_robin, self.local = stage, round_robin, local
        self.saved: list[tuple[Any, ...]] = []

    def zero_optimization(self) -> bool:
        return self.stage > 0

    def zero_optimization_stage(self) -> int:
        return self.stage

    def zero_round_robin_gradients(self) -> bool:
        return self.round_robin

    def use_node_local_storage(self) -> bool:
        return self.local

    def save_checkpoint(
        self, save_dir: str, tag: Any = None, client_state: Any = None, save_latest: bool = True
    ) -> bool:
        self.saved.append((save_dir, tag, client_state, save_latest))
        return True

    def load_checkpoint(self, load_dir: str) -> None:
        raise NotImplementedError


def trained(engine: Engine) -> arg_dist.AdaRankGrad:
    """An optimizer under the engine after one step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 30)
    optimizer = arg_dist.AdaRankGrad(model.named_parameters(), max_rank=4, process_group=None)
    follow_checkpoints(engine, optimizer)
    model(torch.randn(5, 40)).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("engine", "wanted"),
    [
        (Engine(stage=1), True),
        (Engine(stage=3, round_robin=True), True),  # which has no effect there
        (Engine(stage=2, round_robin=True), False),
        (Engine(stage=0), False),
    ],
)
def test_the_converters_moments_take_no_room_and_are_not_loaded(
    engine: Engine, wanted: bool
) -> None:
    optimizer = trained(engine)
    saved = optimizer.state_dict()
    assert [("exp_avg" in entry, "step" in entry) for entry in saved["state"].values()] == (
        [(wanted, wanted)] * 2
    )
    if wanted:
        assert saved["state"][0]["exp_avg_sq"].shape == (30 * 40,)
        assert saved["state"][0]["exp_avg_sq"].untyped_storage().nbytes() == 4
    optimizer.load_state_dict(saved)
    assert [list(units) for units in optimizer.state.values()] == [["weight"], ["bias"]]


def test_saving_takes_a_note_along_and_leaves_the_rest(tmp_path: Path) -> None:
    engine = Engine()
    mine = {"epoch": 3}
    optimizer = trained(engine)
    engine.save_checkpoint(str(tmp_path), client_state=mine, save_latest=False)
    engine.save_checkpoint(str(tmp_path), 0)
    for tag, (directory, given, client_state, latest) in zip(
        ["global_step7", "0"], engine.saved, strict=True
    ):
        assert (directory, given, latest) == (str(tmp_path), tag, tag == "0")
        assert _find_state(tmp_path / "any", client_state[NOTE]) == tmp_path / tag / STATE_FOLDER
    assert engine.saved[0][2]["epoch"] == 3
    assert mine == {"epoch": 3}
    folder = tmp_path / "0" / STATE_FOLDER
    assert arg_dist.checkpoint.load(folder, optimizer, weights=False).step == 7


def test_checkpoints_on_node_local_storage_stay_as_they_are(tmp_path: Path) -> None:
    engine = Engine(local=True)
    trained(engine)
    engine.save_checkpoint(str(tmp_path), "t")
    assert engine.saved == [(str(tmp_path), "t", None, True)]
    assert not list(tmp_path.iterdir())


class ConvertedEngine(Engine):
    """Loads a converted checkpoint as DeepSpeed does: every key of its groups is copied."""

    module = torch.nn.Module()
    groups: list[dict[str, Any]]

    def load_universal_checkpoint(self) -> bool:
        return True

    def load_checkpoint(
        self,
        load_dir: str,
        load_optimizer_states: bool = False,
        load_module_only: bool = False,
    ) -> tuple[str, dict[str, Any]]:
        for group in self.groups:
            group.update(lr=5.0, decay=0.25, theirs=1)
        return load_dir, {}


def test_groups_keep_their_settings_under_the_current_names(tmp_path: Path) -> None:
    engine = ConvertedEngine()
    optimizer = trained(engine)
    engine.groups = optimizer.param_groups
    before = dict(optimizer.param_groups[0])
    engine.load_checkpoint(str(tmp_path))
    assert optimizer.param_groups[0] == {**before, "theirs": 1}


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
    with pytest.raises(CheckpointError, match=r"t_uni: .*is from a later save; copy the folder"):
        _find_state(tmp_path / "t_uni", note)


def test_without_it_the_error_says_what_to_copy(tmp_path: Path) -> None:
    note = {"folder": "/gone/t/adarankgrad", "tag": "t", "sha256": "0"}
    with pytest.raises(CheckpointError, match=r"copy the folder adarankgrad .*\(/gone/t/adarankgr"):
        _find_state(tmp_path / "t_uni", note)


def test_without_a_note_the_weights_alone_can_be_had(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="load_optimizer_states=False"):
        _find_state(tmp_path / "t_uni", None)
