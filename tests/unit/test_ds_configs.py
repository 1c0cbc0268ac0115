"""The shipped DeepSpeed configs: valid, consistent with each other, and explained key by key."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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


def keys(config: Any) -> Iterator[str]:
    """Every key of a nested config."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield key
            yield from keys(value)


def test_these_and_no_others_are_shipped() -> None:
    assert sorted(path.name for path in FOLDER.glob("*.json")) == sorted(FILES)


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
    assert (settings.max_rank, settings.min_rank, settings.energy) == (0.25, 4, 0.9)


@pytest.mark.parametrize("name", FILES)
def test_every_key_and_file_is_explained(name: str) -> None:
    for key in keys(load_deepspeed_config(FOLDER / name)):
        assert f"`{key}`" in README, f"ds_configs/README.md does not explain '{key}'"
    assert f"`{name.replace('_bf16', '')}`" in README


def test_the_readme_explains_nothing_that_is_not_there() -> None:
    used = {key for name in FILES for key in keys(load_deepspeed_config(FOLDER / name))}
    tables = README[README.index("## Keys") : README.index("## Choices")]
    explained = set(re.findall(r"^\| `(\w+)` \|", tables, flags=re.MULTILINE))
    assert explained <= used


@pytest.mark.parametrize("name", FILES)
def test_deepspeed_accepts_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    runtime = pytest.importorskip("deepspeed.runtime.config")
    config = runtime.DeepSpeedConfig(json.loads((FOLDER / name).read_text()))
    assert (config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (16, 1)
