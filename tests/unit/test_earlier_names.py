"""Settings under the names that they had earlier: given with one warning, saved without."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator

import pytest
from matrices import gaussian
from one_process import feed, optimizer_of
from torch import nn

from arg_dist import AdaRankGrad, AdaRankGradConfig, ConfigError, config
from arg_dist.checkpoint import load, save
from arg_dist.checkpoint.index import INDEX_NAME, index_bytes, read_index
from arg_dist.config import RENAMED, parse_config
from arg_dist.engines.deepspeed_config import optimizer_settings
from arg_dist.engines.deepspeed_entry import from_json
from launchers.pretraining.job_config import set_optimizer

EARLIER = {"decay": 0.25, "time_limit": 77.0}
CURRENT = {"refresh_below": 0.25, "collective_timeout": 77.0}


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not warned yet."""
    monkeypatch.setattr(config, "_WARNED_OF", set())


@pytest.fixture
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        yield


def held(optimizer: AdaRankGrad) -> list[dict[str, object]]:
    """The settings that were renamed, as the groups have them under either name."""
    keys = (*RENAMED, *RENAMED.values())
    return [{key: group[key] for key in keys if key in group} for group in optimizer.param_groups]


def under_earlier_names(settings: dict[str, object]) -> dict[str, object]:
    names = {name: earlier for earlier, name in RENAMED.items()}
    return {names.get(key, key): value for key, value in settings.items()}


def test_the_names_are_of_settings_and_were_renamed_once():
    assert set(RENAMED.values()) <= set(AdaRankGradConfig.model_fields)
    assert RENAMED.keys().isdisjoint(AdaRankGradConfig.model_fields)
    assert under_earlier_names(CURRENT) == EARLIER


# -- given -----------------------------------------------------------------------------------------

DOORS = {
    "arguments": lambda settings: optimizer_of(gaussian(8, 6), **settings),
    "JSON": lambda settings: from_json([nn.Parameter(gaussian(8, 6))], **settings),
    "group": lambda settings: AdaRankGrad(
        [{"params": [nn.Parameter(gaussian(8, 6))], **settings}], collective_timeout=77.0
    ),
}


@pytest.mark.parametrize("door", DOORS)
def test_an_earlier_name_is_accepted_with_one_warning(door):
    with pytest.warns(FutureWarning) as told:
        optimizers = [DOORS[door](EARLIER) for _ in range(2)]
    assert [held(each) for each in optimizers] == [[CURRENT]] * 2
    assert len(told) == 2
    for warning, (earlier, name) in zip(told, RENAMED.items(), strict=True):
        assert f".{earlier}: the setting is called {name} now" in str(warning.message)


def test_the_warning_points_to_the_call_that_builds_the_optimizer():
    with pytest.warns(FutureWarning) as told:
        AdaRankGrad([nn.Parameter(gaussian(8, 6))], decay=0.25)
    assert told[0].filename == __file__


@pytest.mark.parametrize("door", DOORS)
def test_both_names_are_an_error(door):
    with pytest.raises(ConfigError, match=r": got decay and refresh_below, .*; remove decay"):
        DOORS[door]({"decay": 0.25, "refresh_below": 0.25})


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_model_and_the_json_know_earlier_names():
    assert parse_config(EARLIER) == parse_config(CURRENT) == AdaRankGradConfig(**EARLIER)
    section = {"type": "AdaRankGrad", "params": EARLIER}
    assert optimizer_settings({"optimizer": section}) == parse_config(CURRENT)
    with pytest.raises(ConfigError, match=r"optimizer\.params\.refresh_below: .*got 2"):
        parse_config({"decay": 2}, "optimizer.params")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_command_line_overrides_an_earlier_name_of_the_json():
    written = {"optimizer": {"type": "AdaRankGrad", "params": EARLIER}}
    settings = set_optimizer(written, "adarankgrad", {"refresh_below": 0.125}, lr=None)
    assert settings["refresh_below"] == 0.125 and settings["collective_timeout"] == 77.0
    assert RENAMED.keys().isdisjoint(written["optimizer"]["params"])


def test_an_earlier_name_that_is_assigned_to_a_group_is_not_passed_over():
    optimizer = optimizer_of(gaussian(8, 6))
    optimizer.param_groups[0]["decay"] = 0.25
    with pytest.raises(ConfigError, match="parameter group: got decay and refresh_below"):
        feed(optimizer, gaussian(8, 6))


# -- saved -----------------------------------------------------------------------------------------


def trained(**settings: object) -> AdaRankGrad:
    """An optimizer of two groups after one step."""
    optimizer = optimizer_of(gaussian(8, 6), **settings)
    optimizer.add_param_group({"params": [nn.Parameter(gaussian(5))]})
    feed(optimizer, gaussian(8, 6), gaussian(5))
    return optimizer


@pytest.mark.usefixtures("silent")
def test_a_state_dict_is_read():
    saved = trained(**CURRENT).state_dict()
    saved["param_groups"] = [under_earlier_names(group) for group in saved["param_groups"]]
    loaded = trained()
    loaded.load_state_dict(saved)
    assert held(loaded) == [CURRENT] * 2
    feed(loaded, gaussian(8, 6), gaussian(5))


def test_a_checkpoint_is_read(tmp_path):
    save(tmp_path / "c", trained(**CURRENT))
    index = read_index(tmp_path / "c")
    groups = [
        group.model_copy(update={"settings": under_earlier_names(group.settings)})
        for group in index.groups
    ]
    assert {key for group in groups for key in group.settings} >= RENAMED.keys()
    earlier = index.model_copy(update={"groups": groups})
    (tmp_path / "c" / INDEX_NAME).write_bytes(index_bytes(earlier, "an earlier version"))
    loaded = trained()
    with pytest.warns(UserWarning, match=r"checkpoint's settings: .*refresh_below=0\.25") as told:
        load(tmp_path / "c", loaded)
    assert len(told) == 1
    # how long to wait is the job's
    assert held(loaded) == [{**CURRENT, "collective_timeout": 1800.0}] * 2


@pytest.mark.usefixtures("silent")
def test_a_pickle_is_read():
    optimizer = trained(**CURRENT)
    for settings in (optimizer.defaults, *optimizer.param_groups):
        renamed = under_earlier_names(settings)
        del renamed["residual_momentum"]  # as of the versions that did not have it
        settings.clear()
        settings.update(renamed)
    loaded = pickle.loads(pickle.dumps(optimizer))
    assert {group["residual_momentum"] for group in loaded.param_groups} == {0.0}
    assert held(loaded) == [CURRENT] * 2
    assert CURRENT.items() <= loaded.defaults.items()
    assert RENAMED.keys().isdisjoint(loaded.defaults)
    feed(loaded, gaussian(8, 6), gaussian(5))
