"""Faults end in one clear error on every process, within seconds, with nothing lost."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch.launching import launch

PROCESSES = 2


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process was told."""
    out: Path = tmp_path_factory.mktemp("faults")
    finished = launch(
        "tests/launch/faults.py",
        *("--out", out),
        processes=PROCESSES,
        seconds=150,
        launcher="forked",
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return [json.loads((out / f"process{i}.json").read_text()) for i in range(PROCESSES)]


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("different-configs", "RuntimeError", ["different DeepSpeed configurations", "process 1"]),
        ("different-settings", "RuntimeError", ["max_rank=12", "max_rank=13", "process 1"]),
        ("unknown-key", "ConfigError", ["optimizer.params.max_rnak", "'max_rank'"]),
        ("elastic-json", "ConfigError", ["zero_optimization.elastic_checkpoint", "false"]),
        ("elastic-client", "ConfigError", ["zero_optimization.elastic_checkpoint", "false"]),
        ("fp16-zero0", "ConfigError", ["fp16.enabled", "bf16"]),
        ("replaced", "ConfigError", ["embed_tokens.weight", "AdamW would train", "for_trainer"]),
        ("another-later", "", ["no error"]),
        ("complex", "ConfigError", ["phases: got a parameter of type torch.complex64", "FSDP2"]),
    ],
)
def test_every_process_is_told(
    faults: list[dict[str, Any]], fault: str, kind: str, words: list[str]
) -> None:
    for process in faults:
        told = process[fault]
        assert told["kind"] == kind
        assert all(word in told["message"] for word in words), told["message"]
        assert told["seconds"] < 10


LATE = ["0-bf16", "1-fp32", "2-bf16", "3-fp32", "3-bf16"]


@pytest.mark.parametrize("case", LATE)
def test_weights_loaded_after_initialize_are_an_error_that_says_so(
    faults: list[dict[str, Any]], case: str
) -> None:
    for process in faults:
        told = process[f"late-{case}"]
        assert told["kind"] == "RuntimeError"
        for words in ("changed after", "before deepspeed.initialize", "refresh_fp32_params()"):
            assert words in told["message"]
        assert "version" not in told["message"] and told["moved"] == 0


@pytest.mark.parametrize("case", LATE)
def test_after_the_remedy_training_goes_on_from_the_loaded_weights(
    faults: list[dict[str, Any]], case: str
) -> None:
    for process in faults:
        told = process[f"late-{case}-refreshed"]
        assert told["message"] == "no error"
        assert 0 < told["moved"] < 0.05


@pytest.mark.parametrize("stage", [1, 3])
def test_groups_may_have_names_of_their_own(faults: list[dict[str, Any]], stage: int) -> None:
    for process in faults:
        told = process[f"keys-{stage}"]
        assert told["message"] == "no error" and told["names"][:2] == ["group 0", "group 1"]


@pytest.mark.parametrize("fault", ["nan-zero0", "nan-zero2", "nan-zero3"])
def test_a_nan_gradient_on_one_process_changes_nothing(
    faults: list[dict[str, Any]], fault: str
) -> None:
    for process in faults:
        told = process[fault]
        assert told["intact"]
        named = told["kind"] == "FloatingPointError" and "layers.1.mlp.up_proj" in told["message"]
        assert named or told["skipped"] == 1  # DeepSpeed itself skips where it takes a norm
