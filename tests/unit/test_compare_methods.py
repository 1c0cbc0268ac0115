"""Which methods are compared, with which settings and learning rates."""

import sys

import pytest

from arg_dist.cli.parsing import InputError
from benchmarks.compare import peers
from benchmarks.compare.methods import (
    PUBLISHED_FINETUNING,
    RATES,
    REST_RATES,
    choose,
    rates_of,
)

FAMILIES = ("adamw", "galore", "recommended")


def test_settings_are_the_published_ones_with_the_rank_that_was_asked_for():
    galore, ours = choose(["galore", "recommended"], peer_rank=0.125, overrides=["energy=0.7"])
    assert galore.settings == {
        "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", "rank": 0.125,
        "rest_betas": (0.9, 0.95),
    }  # fmt: skip
    assert ours.settings["energy"] == 0.7
    assert galore.definition()["versions"]["galore-torch"]
    assert ours.definition()["every_setting"]["energy"] == 0.7
    assert len(ours.definition()["code"]) == 12


def test_a_variant_is_recommended_or_another_method_with_other_settings():
    methods = choose(
        ["recommended"],
        peer_rank=4,
        variants=[["e0.6", "energy=0.6", "residual=none"], ["fast", "galore", "scale=1.0"]],
    )
    recommended, e06, fast = methods
    assert e06.settings == {**recommended.settings, "energy": 0.6, "residual": "none"}
    assert (fast.name, fast.family, fast.settings["scale"]) == ("fast", "galore", 1.0)
    assert fast.settings["rank"] == 4


def test_betas_and_momentum_are_settings_of_variants():
    adamw, muon, slow, fast = choose(
        ["adamw", "muon"],
        peer_rank=4,
        variants=[["slow", "adamw", "betas=[0.9,0.99]"], ["fast", "muon", "momentum=0.8"]],
    )
    assert adamw.settings == {"betas": (0.9, 0.95), "rest_betas": (0.9, 0.95)}
    assert (muon.settings["momentum"], fast.settings["momentum"]) == (0.9, 0.8)
    assert slow.settings == {"betas": [0.9, 0.99], "rest_betas": (0.9, 0.95)}


def test_fine_tuning_keeps_torchs_betas():
    methods = choose(["adamw", "galore", "lora"], peer_rank=4, published=PUBLISHED_FINETUNING)
    adamw, galore, lora = (method.settings for method in methods)
    assert adamw["betas"] == adamw["rest_betas"] == galore["rest_betas"] == (0.9, 0.999)
    assert galore["scale"] == 4.0 and "rest_betas" not in lora


@pytest.mark.parametrize(
    ("names", "more", "told"),
    [
        (["adam"], {}, "--methods adam: unknown method; choose from adamw, galore"),
        (["adamw", "adamw"], {}, "two methods are named adamw"),
        (["recommended"], {"overrides": ["enrgy=1"]}, "did you mean 'energy'"),
        (["adamw"], {"variants": [["energy=1"]]}, "a name of letters"),
        (["adamw"], {"variants": [["v", "sgd"]]}, "--variant v sgd: unknown method"),
        (["adamw"], {"variants": [["v", "galore", "gap=3"]]}, "galore accepts update_proj_gap"),
        (["adamw"], {"variants": [["v", "galore", "gap"]]}, "expected key=value"),
        (
            ["adamw"],
            {"variants": [["v", "adamw", "betas=0.9"]]},
            "v betas=0.9: expected two numbers",
        ),
        (
            ["adamw"],
            {"variants": [["v", "muon", "momentum=1"]]},
            "v momentum=1: expected a number of",
        ),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(names, more, told):
    with pytest.raises(InputError) as error:
        choose(names, peer_rank=0.125, **more)
    assert told in str(error.value)


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    found = peers.find_spec
    monkeypatch.setattr(
        peers, "find_spec", lambda name: None if name in ("galore_torch", "fira") else found(name)
    )
    with pytest.raises(InputError) as error:
        peers.require({"adamw", "galore", "apollo", "fira", "adarankgrad"})
    assert "fira, galore-torch not installed" in str(error.value)
    assert "pip install --no-deps fira galore-torch" in str(error.value)
    peers.require({"adamw", "apollo", "muon"})


def test_published_optimizers_come_without_bitsandbytes():
    for package, module in (("galore_torch", "adamw"), ("apollo_torch", "apollo")):
        adamw = peers.published(package, module, "AdamW")
        assert adamw.__module__ == f"{package}.{module}"
    assert "bitsandbytes" not in sys.modules


def test_a_variant_begins_with_the_rates_of_its_method():
    methods = choose(["paper"], peer_rank=4, variants=[["g", "galore"], ["v", "scale=2.0"]])
    rates = rates_of(methods, {})
    assert [rates[name].lr for name in ("paper", "g", "v")] == [
        RATES["paper"], RATES["galore"], RATES["recommended"],
    ]  # fmt: skip


def test_all_methods_have_as_many_learning_rates_or_their_default_numbers():
    methods = choose(FAMILIES, peer_rank=0.125)
    rates = rates_of(methods, {}, rest=REST_RATES)
    assert {name: len(each.lr) for name, each in rates.items()} == {
        "adamw": 3, "galore": 4, "recommended": 3,
    }  # fmt: skip
    assert rates["recommended"].lr == RATES["recommended"]
    assert {each.rest_lr for each in rates.values()} == {(8e-3, 1.6e-2, 3.2e-2)}
    given = rates_of(methods, {"adamw": (1e-3, 2e-3, 1.5e-3)})
    assert given["adamw"].lr == (1e-3, 1.5e-3, 2e-3) and given["adamw"].rest_lr == ()
    one = rates_of(methods, dict.fromkeys(FAMILIES, (1e-3,)))
    assert {each.lr for each in one.values()} == {(1e-3,)}
    with pytest.raises(InputError, match="same number of learning rates, got adamw 1, galore 4"):
        rates_of(methods, {"adamw": (1e-3,)})
    with pytest.raises(InputError, match="default numbers: adamw 3, galore 4, recommended 3"):
        rates_of(methods, {"recommended": (1e-3, 2e-3, 3e-3, 4e-3)})
    with pytest.raises(InputError, match=r"--lrs fira=\.\.\.: not among the methods adamw"):
        rates_of(methods, {"fira": (1e-3,)})


def test_the_rest_may_have_rates_of_its_own_in_each_method():
    methods = choose(["adamw", "muon"], peer_rank=4)
    given = {"adamw": (1e-3,), "muon": (1e-2,)}
    rates = rates_of(methods, given, rest=(1e-2, 3e-2), own_rest={"muon": (6e-2, 2e-2)})
    assert (rates["adamw"].rest_lr, rates["muon"].rest_lr) == ((1e-2, 3e-2), (2e-2, 6e-2))
    with pytest.raises(InputError, match=r"--rest-lr: every .* same number .* adamw 2, muon 1"):
        rates_of(methods, given, rest=(1e-2, 3e-2), own_rest={"muon": (6e-2,)})
    with pytest.raises(InputError, match=r"--rest-lr fira=\.\.\.: not among the methods adamw"):
        rates_of(methods, given, own_rest={"fira": (1e-2,)})


def test_lora_has_one_rate():
    methods = choose(["adamw", "lora"], peer_rank=4, published=PUBLISHED_FINETUNING)
    rates = rates_of(methods, {"adamw": (1e-3,), "lora": (2e-3,)}, RATES | {"lora": ()}, (5e-3,))
    assert (rates["adamw"].rest_lr, rates["lora"].rest_lr) == ((5e-3,), ())
