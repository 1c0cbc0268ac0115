"""The Trainer of transformers, and TRL's: every way gives what one process gives."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from tests.launch.launching import ROOT, Start, launch
from tests.launch.trainer_cases import (
    ACCELERATE,
    ACCELERATE_DEEPSPEED,
    ACCELERATE_FSDP2,
    ALONE,
    DDP,
    DEEPSPEED,
    PREFERENCES,
    SAVED_AFTER,
    STEPS,
    WAYS,
    Way,
    shipped,
)
from tests.tolerances import LOSSES

LAUNCHES: dict[str, tuple[Start, int, list[Way]]] = {
    "alone": ("forked", 1, ALONE),
    "ddp": ("forked", 2, DDP),
    "deepspeed": ("deepspeed", 2, DEEPSPEED),
    "accelerate": ("accelerate", 2, ACCELERATE),
    "accelerate-fsdp2": ("accelerate", 2, ACCELERATE_FSDP2),
    "accelerate-deepspeed": ("accelerate", 2, ACCELERATE_DEEPSPEED),
}
QUIET = ("--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no")
LAUNCH_OF = {way.name: name for name, (_, _, ways) in LAUNCHES.items() for way in ways}
TRAINED = [name for name, way in WAYS.items() if not way.refused and way.door not in PREFERENCES]
LOGGED = [name for name in TRAINED if not WAYS[name].bare]
RESUMED = [name for name, way in WAYS.items() if way.resume]
AT_THE_END = [name for name, way in WAYS.items() if way.arguments.get("load_best_model_at_end")]
REPORTED = [name for name, way in WAYS.items() if "report_to" in way.arguments and not way.bare]

Ran = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where a launch wrote; each launch is made once, when it is first asked for."""
    done: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in done:
            launcher, processes, ways = LAUNCHES[name]
            done[name] = out = tmp_path_factory.mktemp(name)
            options: list[object] = []
            if launcher == "accelerate":
                options = [*QUIET, "--multi_gpu"]
            if name == "accelerate-deepspeed":
                (out / "deepspeed.json").write_text(json.dumps(shipped("trainer_zero2.json")))
                config = out / "deepspeed.json"
                options = [*QUIET, "--use_deepspeed", "--deepspeed_config_file", config]
            scripts = ["tests/launch/trainer_runs.py"]
            if name == "accelerate-fsdp2":
                options = ["--config_file", "launchers/accelerate/fsdp2.yaml"]
                scripts.insert(0, "tests/launch/cpu_fsdp.py")
            finished = launch(
                *scripts,
                *("--out", out, "--ways", *(way.name for way in ways)),
                processes=processes,
                seconds=300,
                launcher=launcher,
                options=options,
                variables={"PYTHONPATH": str(ROOT)},
            )
            assert finished.returncode == 0, finished.stderr[-6000:]
        return done[name]

    return of


@pytest.fixture(scope="module")
def ran(folders: Callable[[str], Path]) -> Ran:
    """What a way to train did."""

    def of(way: str) -> dict[str, Any]:
        results = json.loads((folders(LAUNCH_OF[way]) / "results.json").read_text())
        return results[way]

    return of


@pytest.mark.parametrize("way", TRAINED)
def test_losses_and_ranks_are_those_of_one_process(ran: Ran, way: str) -> None:
    result, single = ran(way), ran("single")
    assert result["optimizer"] == "AdaRankGrad"
    assert result["processes"] == LAUNCHES[LAUNCH_OF[way]][1]
    assert len(result["losses"]) == WAYS[way].arguments.get("max_steps", STEPS)
    same_data = 1 if "ignore_data_skip" in WAYS[way].arguments else STEPS
    for loss, expected in zip(result["losses"][:same_data], single["losses"], strict=False):
        LOSSES.check(loss, expected)
    if not WAYS[way].bare:
        assert result["ranks"] == single["ranks"][: len(result["ranks"])]


def test_one_process_learns_and_changes_ranks(ran: Ran) -> None:
    single = ran("single")
    assert single["losses"][-1] < single["losses"][0] - 0.2
    assert single["ranks"][0] != single["ranks"][-1]
    assert len(single["ranks"][0]) == 14


@pytest.mark.parametrize("way", LOGGED)
def test_parameters_have_their_names_in_the_model(ran: Ran, way: str) -> None:
    names = ran(way)["names"]
    assert len(names) == 21
    assert "model.layers.1.mlp.down_proj.weight" in names
    low_rank = {key.removeprefix("rank/") for key in ran(way)["ranks"][-1]}
    assert low_rank == {name for name in names if name.endswith("_proj.weight")}


@pytest.mark.parametrize("way", RESUMED)
def test_resuming_from_the_trainers_checkpoint_is_bitwise(ran: Ran, way: str) -> None:
    result = ran(way)
    # what is before the checkpoint comes from its log
    assert len(result["resumed"]["losses"]) == STEPS > SAVED_AFTER
    assert result["resumed"]["losses"] == result["losses"]
    assert result["resumed"]["ranks"] == result["ranks"]
    assert result["resumed"]["evaluated"] == result["evaluated"]


@pytest.mark.parametrize("way", ["ddp-dpo", "ddp-set", "zero2-set"])
def test_a_trainer_of_trl_without_the_argument_trains(ran: Ran, way: str) -> None:
    result = ran(way)
    assert (result["optimizer"], result["processes"]) == ("AdaRankGrad", 2)
    assert result["losses"][-1] < result["losses"][0] - 0.02
    for loss, expected in zip(result["losses"], ran("ddp-dpo")["losses"], strict=True):
        LOSSES.check(loss, expected)


def test_a_checkpoint_of_weights_only_has_no_state(folders: Callable[[str], Path]) -> None:
    checkpoint = folders(LAUNCH_OF["ddp-set"]) / "ddp-set" / f"checkpoint-{SAVED_AFTER}"
    assert (checkpoint / "model.safetensors").exists()
    assert not (checkpoint / "optimizer.pt").exists()


@pytest.mark.parametrize(
    ("way", "written"), [("fsdp2", "optimizer_0"), ("fsdp2-by-arguments", "optimizer.bin")]
)
def test_fsdp2_resumes_from_either_form_of_checkpoint(
    ran: Ran, folders: Callable[[str], Path], way: str, written: str
) -> None:
    assert ran(way)["resumed"]["losses"] == ran(way)["losses"]
    assert (folders(LAUNCH_OF[way]) / way / f"checkpoint-{SAVED_AFTER}" / written).exists()


@pytest.mark.parametrize("way", AT_THE_END)
def test_the_best_model_is_loaded_at_the_end(ran: Ran, way: str) -> None:
    result, single = ran(way), ran("single")
    middle, end = result["evaluated"]
    LOSSES.check(middle, single["evaluated"][0])
    assert middle > end + 0.1
    assert result["evaluated_at_end"] == middle
    assert result["resumed"]["evaluated_at_end"] == middle


@pytest.mark.parametrize("way", REPORTED)
def test_numbers_are_in_the_event_files_of_tensorboard(
    ran: Ran, folders: Callable[[str], Path], way: str
) -> None:
    last = ran(way)["last_log"]
    found = scalars(folders(LAUNCH_OF[way]) / way / "runs")
    for key in (
        "rank_mean",
        "rank_min",
        "rank_max",
        "energy_mean",
        "optimizer_state_bytes",
        "optimizer_state_share",
        "optimizer_sent_bytes",
        "optimizer_collectives",
        "rank/model.layers.0.mlp.up_proj.weight",
    ):
        assert sorted(found[f"train/{key}"]) == list(range(1, STEPS + 1))
        assert found[f"train/{key}"][STEPS] == pytest.approx(last[key])  # of fp32
    assert 0 < last["optimizer_state_share"] < 0.5
    assert 0 < last["energy_mean"] <= 1
    for key in ("optimizer_sent_bytes", "optimizer_collectives"):
        assert (last[key] > 0) == (ran(way)["processes"] > 1)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag, step and value of all scalars; a record is its length, a checksum, itself, another."""
    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.rglob("*tfevents*")):
        content = file.read_bytes()
        start = 0
        while start < len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            event = Event.FromString(content[start + 12 : start + 12 + length])
            start += length + 16
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_the_line_spares_norms_and_biases_the_decay_and_the_json_does_not(ran: Ran) -> None:
    assert len(ran("zero2")["decay"]) == 3  # matrices, embeddings and head, norms and biases
    assert ran("json-decay")["decay"] == [0.1]


@pytest.mark.parametrize("way", ["both", "accelerate-both"])
def test_two_optimizers_are_refused(ran: Ran, way: str) -> None:
    assert ran(way)["told"].startswith("optimizer: the DeepSpeed JSON has this section")
    assert ran(way)["steps"] == 0


@pytest.mark.parametrize("way", ["dropped", "forgotten"])
def test_another_optimizer_is_noticed_before_the_first_step(ran: Ran, way: str) -> None:
    told = ran(way)["told"]
    assert told.startswith("optimizer: ")
    assert "AdamW" in told
    assert "optimizer_cls_and_kwargs=arg_dist.for_trainer(args" in told
    assert ran(way)["steps"] == 0
