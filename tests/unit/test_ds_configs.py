"""The shipped DeepSpeed configs: valid, consistent with each other, and explained key by key."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arg_dist.config import ConfigError
from arg_dist.engines.deepspeed_config import (
    KNOWN_KEYS,
    load_deepspeed_config,
    optimizer_settings,
    refuse_unsupported,
    warn_defaults,
)

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
README = (FOLDER / "README.md").read_text()
FORMS = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
FILES = [f"{form}{precision}.json" for form in FORMS for precision in ("", "_bf16")]
TRAINER_FILES = ["trainer_zero2.json", "trainer_zero3.json"]
"""Those whose "auto" values the Trainer fills in; tests/launch/test_trainer.py trains with them."""
AUTO = {"lr", "betas", "eps", "weight_decay"}


def keys(config: Any) -> Iterator[str]:
    """Every key of a nested config."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield key
            yield from keys(value)


def test_these_and_no_others_are_shipped() -> None:
    assert sorted(path.name for path in FOLDER.glob("*.json")) == sorted(FILES + TRAINER_FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("cuda", [False, True])
def test_it_passes_our_checks_without_a_remark(name: str, cuda: bool) -> None:
    config = load_deepspeed_config(FOLDER / name)
    assert set(config) <= KNOWN_KEYS
    refuse_unsupported(config, cuda=cuda)
    refuse_unsupported({**config, "optimizer": None}, cuda=cuda)  # an optimizer object instead
    assert warn_defaults(config) == []


@pytest.mark.parametrize("name", FILES)
def test_its_name_tells_what_it_does(name: str) -> None:
    config = load_deepspeed_config(FOLDER / name)
    zero = config["zero_optimization"]
    assert zero["stage"] == int(name[4])
    assert ("offload_optimizer" in zero) == ("offload" in name)
    assert ("bf16" in config) == ("bf16" in name)


@pytest.mark.parametrize("name", FILES)
def test_what_is_not_in_its_name_is_the_same_in_all(name: str) -> None:
    config, first = (load_deepspeed_config(FOLDER / file) for file in (name, FILES[0]))
    for key in first:
        if key != "zero_optimization":
            assert config[key] == first[key]
    settings = optimizer_settings(config)
    assert (settings.max_rank, settings.min_rank, settings.energy) == (0.25, 4, 0.65)


@pytest.mark.parametrize("name", FILES + TRAINER_FILES)
def test_every_key_and_file_is_explained(name: str) -> None:
    for key in keys(load_deepspeed_config(FOLDER / name)):
        assert f"`{key}`" in README, f"ds_configs/README.md does not explain '{key}'"
    assert f"`{name.replace('_bf16', '')}`" in README


def test_the_readme_explains_nothing_that_is_not_there() -> None:
    files = FILES + TRAINER_FILES
    used = {key for name in files for key in keys(load_deepspeed_config(FOLDER / name))}
    tables = README[README.index("## Keys") : README.index("## Choices")]
    explained = set(re.findall(r"^\| `(\w+)` \|", tables, flags=re.MULTILINE))
    assert explained <= used


@pytest.mark.parametrize("name", TRAINER_FILES)
@pytest.mark.parametrize("cuda", [False, True])
def test_one_for_the_trainer_is_the_plain_one_but_for_what_is_auto(name: str, cuda: bool) -> None:
    config = load_deepspeed_config(FOLDER / name)
    plain = load_deepspeed_config(FOLDER / name.removeprefix("trainer_"))
    assert set(config) <= KNOWN_KEYS
    refuse_unsupported(config, cuda=cuda)
    assert warn_defaults(config) == []
    filled = {key: plain["optimizer"]["params"].get(key, 1e-8) for key in AUTO}
    params = config["optimizer"]["params"]
    assert {key for key, value in params.items() if value == "auto"} == AUTO
    config["optimizer"]["params"] = {**params, **filled}
    assert optimizer_settings(config) == optimizer_settings(plain)
    zero = config["zero_optimization"]
    assert zero.keys() == plain["zero_optimization"].keys()
    for key, value in zero.items():
        assert value in ("auto", plain["zero_optimization"][key])


@pytest.mark.parametrize("name", TRAINER_FILES)
def test_what_only_the_trainer_fills_in_is_refused_elsewhere(name: str) -> None:
    with pytest.raises(ConfigError, match=r'params\.lr: got "auto", which only the Trainer'):
        optimizer_settings(load_deepspeed_config(FOLDER / name))


@pytest.mark.parametrize("name", FILES)
def test_deepspeed_accepts_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    runtime = pytest.importorskip("deepspeed.runtime.config")
    config = runtime.DeepSpeedConfig(json.loads((FOLDER / name).read_text()))
    assert (config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (16, 1)
