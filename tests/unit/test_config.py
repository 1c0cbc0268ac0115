"""Settings: what is refused, with which words, at which door."""

from __future__ import annotations

import pydantic
import pytest
from matrices import gaussian
from one_process import feed, optimizer_of
from torch import nn

from arg_dist import AdaRankGrad, AdaRankGradConfig, ConfigError
from arg_dist.config import parse_config, plain
from arg_dist.parameter_groups import settings_of


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_rnak": 4}, r"AdaRankGrad\.max_rnak: unknown key; did you mean 'max_rank'\?"),
        ({"zzz": 4}, r"AdaRankGrad\.zzz: unknown key$"),
        ({"lr": -1}, r"AdaRankGrad\.lr: .*greater than or equal to 0, got -1"),
        ({"betas": (0.9,)}, r"AdaRankGrad\.betas: two numbers are needed, got 1"),
        ({"betas": (0.9, 1.0)}, r"AdaRankGrad\.betas: .*less than 1, got 1\.0"),
        ({"energy": 0}, r"AdaRankGrad\.energy: .*greater than 0, got 0"),
        ({"max_rank": 0}, r"AdaRankGrad\.max_rank: got 0; a whole number of at least 1, or a frac"),
        ({"max_rank": 1.5}, r"AdaRankGrad\.max_rank: got 1\.5; a whole number"),
        ({"max_rank": "8"}, r"AdaRankGrad\.max_rank: got '8'; a whole number"),
        ({"max_rank": 2, "min_rank": 3}, r"max_rank \(2\) is smaller than min_rank \(3\)"),
        ({"max_rank": 0.1, "min_rank": 0.2}, r"max_rank \(0\.1\) is smaller than min_rank"),
        ({"min_gap": 9, "max_gap": 3}, r"min_gap \(9\) is larger than max_gap \(3\): lower"),
        ({"min_gap": 9, "first_gap": 3}, r"first_gap \(3\) is not between min_gap \(9\) and max_"),
        ({"preset": "paper", "max_gap": 0}, r"^AdaRankGrad\.max_gap: .*or equal to 1, got 0$"),
        ({"max_gap": 2.5}, r"^AdaRankGrad\.max_gap: .*a number with a fractional part, got 2\.5$"),
        ({"preset": "paper", "min_gap": "x"}, r"^AdaRankGrad\.min_gap: .* integer, .*, got 'x'$"),
        ({"transport": "svd"}, r"AdaRankGrad\.transport: .*'squared', 'paper'.* got 'svd'"),
        ({"side": "top"}, r"AdaRankGrad\.side: .*got 'top'"),
        ({"refresh_below": 1.0}, r"AdaRankGrad\.refresh_below: .*less than 1"),
        ({"seed": -1}, r"AdaRankGrad\.seed: "),
        ({"state_budget": "2 gigs"}, r"AdaRankGrad\.state_budget: a size such as .*, got '2 gigs'"),
        ({"state_budget": "100 kilos"}, r"or a number of bytes, is needed, got '100 kilos'"),
        ({"state_budget": "-1GiB"}, r'"512MiB", or a number of bytes, is needed, got'),
        ({"state_budget": 0}, r"or a number of bytes, is needed, got 0"),
        ({"state_budget": True}, r"or a number of bytes, is needed, got True"),
        ({"state_budget": float("nan")}, r"or a number of bytes, is needed, got nan"),
        ({"bucket_size": "1 gig"}, r"AdaRankGrad\.bucket_size: a size such as .*, got '1 gig'"),
        ({"bucket_size": None}, r"AdaRankGrad\.bucket_size: .*got None"),
        ({"matmul_precision": "bf16"}, r"\.matmul_precision: .*'medium'.* got 'bf16'"),
        ({"collective_timeout": 0}, r"AdaRankGrad\.collective_timeout: .*greater than 0, got 0"),
        (
            {"collective_timeout": float("inf")},
            r"AdaRankGrad\.collective_timeout: .*less than or equal",
        ),
    ],
)
def test_a_bad_setting_is_named_with_what_is_needed(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(settings)
    with pytest.raises(ConfigError, match=message):
        AdaRankGrad([nn.Parameter(gaussian(4, 3))], **settings)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ("2GiB", 2 * 2**30),
        ("512MiB", 512 * 2**20),
        ("1.5 GB", 1_500_000_000),
        ("100KB", 100_000),
        ("100kB", 100_000),
        ("2gib", 2 * 2**30),
        ("4096", 4096),
        ("1e9", 10**9),
        (1.5e9, 1_500_000_000),
        (4096, 4096),
        (None, None),
    ],
)
def test_sizes_are_read_as_people_write_them(given, size):
    assert parse_config({"state_budget": given}).state_budget == size
    assert parse_config({"state_budget": size}).state_budget == size


def test_every_fault_gets_a_line():
    with pytest.raises(ConfigError) as caught:
        parse_config({"lr": "fast", "energy": 2, "nergy": 0.5}, "optimizer.params")
    keys = [line.partition(":")[0] for line in str(caught.value).splitlines()]
    assert sorted(keys) == [f"optimizer.params.{key}" for key in ("energy", "lr", "nergy")]


def test_settings_cannot_be_changed():
    with pytest.raises(pydantic.ValidationError):
        AdaRankGradConfig().lr = 1.0


@pytest.mark.parametrize(
    ("smallest", "largest", "short", "bounds"),
    [
        (4, 128, 64, (4, 64)),
        (4, 16, 64, (4, 16)),
        (0.25, 0.5, 64, (16, 32)),
        (4, 0.25, 64, (4, 16)),
        (4, 0.01, 64, (1, 1)),
        (0.9, 8, 64, (8, 8)),
        (4, 128, 2, (2, 2)),
    ],
)
def test_ranks_are_whole_or_fractions_of_the_shorter_side(smallest, largest, short, bounds):
    config = AdaRankGradConfig(min_rank=smallest, max_rank=largest)
    assert config.rank_bounds(short) == bounds


GAPS = ("min_gap", "first_gap", "max_gap")


@pytest.mark.parametrize(
    ("given", "gaps"),
    [
        ({}, (20, None, 200)),
        ({"max_gap": 10}, (10, None, 10)),
        ({"max_gap": 10.0}, (10, None, 10)),
        ({"max_gap": 100}, (20, None, 100)),
        ({"min_gap": 300}, (300, None, 300)),
        ({"first_gap": 5}, (5, 5, 200)),
        ({"first_gap": 500}, (20, 500, 500)),
        ({"max_gap": 10, "first_gap": 5}, (5, 5, 10)),
        ({"max_gap": 10, "first_gap": None}, (10, None, 10)),
        ({"preset": "paper"}, (1, 200, 200)),
        ({"preset": "paper", "max_gap": 50}, (1, 50, 50)),
        ({"preset": "paper", "max_gap": 50, "first_gap": None}, (1, None, 50)),
        ({"preset": "paper", "min_gap": 300}, (300, 300, 300)),
        ({"preset": "paper", "max_gap": 500}, (1, 200, 500)),
    ],
)
def test_a_gap_that_is_not_given_follows_those_that_are(given, gaps):
    config = parse_config(given)
    assert tuple(getattr(config, key) for key in GAPS) == gaps
    optimizer = optimizer_of(gaussian(8, 6), preset=given.get("preset", "recommended"))
    own = {key: value for key, value in given.items() if key != "preset"}
    optimizer.add_param_group({"params": [nn.Parameter(gaussian(8, 6))], **own})
    assert tuple(optimizer.param_groups[1][key] for key in GAPS) == gaps


def test_the_optimizers_gaps_give_way_to_those_of_a_group():
    optimizer = optimizer_of(gaussian(8, 6), min_gap=30, first_gap=60, max_gap=90)
    for own, gaps in [
        ({}, (30, 60, 90)),
        ({"max_gap": 10}, (10, 10, 10)),
        ({"max_gap": 50}, (30, 50, 50)),
        ({"min_gap": 70}, (70, 70, 90)),
    ]:
        optimizer.add_param_group({"params": [nn.Parameter(gaussian(8, 6))], **own})
        assert tuple(optimizer.param_groups[-1][key] for key in GAPS) == gaps
    group = {"params": [nn.Parameter(gaussian(8, 6))], "min_gap": 9, "max_gap": 3}
    with pytest.raises(ConfigError, match=r"parameter group 5: min_gap \(9\) is larger than"):
        optimizer.add_param_group(group)


def test_a_group_overrides_the_optimizers_settings():
    weights = [gaussian(8, 6, seed=seed) for seed in range(2)]
    groups = [
        {"params": [nn.Parameter(weights[0])], "max_rank": 2},
        {"params": [nn.Parameter(weights[1])], "side": "left", "lr": 0.5},
    ]
    optimizer = AdaRankGrad(groups, lr=0.1, max_rank=5, min_rank=1, energy=1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]
    feed(optimizer, *weights)
    stats = [(entry["rank"], entry["side"]) for entry in optimizer.stats()]
    assert stats == [(2, "right"), (5, "left")]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"max_rank": 0}, r"parameter group 1\.max_rank: got 0"),
        ({"enrgy": 0.5}, r"parameter group 1\.enrgy: unknown key; did you mean 'energy'\?"),
        ({"max_rank": 2, "min_rank": 3}, r"parameter group 1: max_rank \(2\) is smaller"),
        ({"targets": ["mlp"]}, r"parameter group 1\.targets: .*the optimizer as a whole"),
        ({"state_budget": 9}, r"parameter group 1\.state_budget: .*the optimizer as a whole"),
        (
            {"collective_timeout": 9},
            r"parameter group 1\.collective_timeout: .*the optimizer as a whole",
        ),
    ],
)
def test_a_groups_settings_are_checked_like_the_optimizers(group, message):
    optimizer = optimizer_of(gaussian(8, 6))
    with pytest.raises(ConfigError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(gaussian(8, 6))], **group})


def test_patterns_need_a_model():
    optimizer = optimizer_of(gaussian(8, 6), targets=["mlp"])
    with pytest.raises(ConfigError, match=r"arg_dist\.param_groups\(model, targets="):
        feed(optimizer, gaussian(8, 6))


def test_a_name_may_occur_only_once():
    named = [("w", nn.Parameter(gaussian(4, 3))), ("w", nn.Parameter(gaussian(4, 3)))]
    with pytest.raises(ConfigError, match="the parameter name 'w' occurs twice"):
        AdaRankGrad(named)


@pytest.mark.parametrize(
    "changed",
    [{}, {"lr": 0.5}, {"betas": (0.5, 0.6)}, {"betas": [0.5, 0.6]}, {"scale": 1}, {"scale": 1.0}],
)
def test_the_settings_of_a_group_are_those_it_holds_now(changed):
    group = {**dict(parse_config({})), "params": [], "name": "theirs"}
    settings_of(group)
    group |= changed
    found = settings_of(group)
    assert [(key, repr(value)) for key, value in found] == [
        (key, repr(plain(group[key]))) for key in AdaRankGradConfig.model_fields
    ]
    assert found.model_fields_set == set(AdaRankGradConfig.model_fields)
