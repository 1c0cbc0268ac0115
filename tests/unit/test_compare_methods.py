"""Which methods are compared, with which settings and learning rates."""

import sys

import pytest

from arg_dist.cli.parsing import InputError
from benchmarks.compare import peers
from benchmarks.compare.methods import RATES, choose, rates_of

FAMILIES = ("adamw", "galore", "recommended")


def test_settings_are_the_published_ones_with_the_rank_that_was_asked_for():
    galore, ours = choose(["galore", "recommended"], peer_rank=0.125, overrides=["energy=0.7"])
    assert galore.settings == {
        "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", "rank": 0.125,
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
    assert [rates[name] for name in ("paper", "g", "v")] == [
        RATES["paper"], RATES["galore"], RATES["recommended"],
    ]  # fmt: skip


def test_all_methods_have_as_many_learning_rates():
    methods = choose(FAMILIES, peer_rank=0.125)
    rates = rates_of(methods, {})
    assert {len(each) for each in rates.values()} == {4}
    assert rates["recommended"] == RATES["recommended"]
    given = rates_of(methods, {"adamw": (4e-3, 1e-3, 2e-3, 3e-3)})
    assert given["adamw"] == (1e-3, 2e-3, 3e-3, 4e-3)
    with pytest.raises(InputError, match="same number of learning rates, got adamw 1, galore 4"):
        rates_of(methods, {"adamw": (1e-3,)})
    with pytest.raises(InputError, match=r"--lrs fira=\.\.\.: not among the methods adamw"):
        rates_of(methods, {"fira": (1e-3,)})
