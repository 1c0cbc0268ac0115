"""Keys of parameter groups: what is a setting, what is someone else's; and settings as tensors."""

from __future__ import annotations

import warnings

import pytest
import torch
from matrices import gaussian
from one_process import feed, optimizer_of, parameters_of
from torch import nn

from arg_dist import AdaRankGrad, AdaRankGradConfig, ConfigError, param_groups
from arg_dist.checkpoint import load, save
from arg_dist.group_keys import OF_OTHERS, misspelled


def group_with(**keys):
    return AdaRankGrad([{"params": [nn.Parameter(gaussian(8, 6))], **keys}]).param_groups[0]


@pytest.mark.parametrize("key", [*sorted(OF_OTHERS), "weight_decay_mult", "no_decay"])
def test_keys_of_other_libraries_are_kept(key):
    with warnings.catch_warnings():
        warnings.simplefilter("error" if key in OF_OTHERS else "ignore")
        assert group_with(**{key: "theirs"})[key] == "theirs"
    assert misspelled(key) is None


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("enrgy", "energy"),
        ("max_rnak", "max_rank"),
        ("maxrank", "max_rank"),
        ("weight_decy", "weight_decay"),
        ("weightdecay", "weight_decay"),
        ("LR", "lr"),
        ("sclae", "scale"),
        ("beta", "betas"),
        ("min_gaps", "min_gap"),
        ("low_ranks", "low_rank"),
    ],
)
def test_a_misspelled_setting_is_an_error(key, meant):
    with pytest.raises(ConfigError, match=rf"group 0\.{key}: unknown key; did you mean '{meant}'"):
        group_with(**{key: 1})


@pytest.mark.parametrize("key", AdaRankGradConfig.model_fields)
def test_every_setting_with_a_letter_too_few_or_too_many_is_an_error(key):
    for wrong in {key + "s", key[:-1]} if len(key) > 2 else {key + "s"}:
        if wrong not in AdaRankGradConfig.model_fields:
            assert misspelled(wrong) is not None, wrong


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("learning_rate", 0.1, "called lr"),
        ("rank", 128, "called max_rank and min_rank"),
        ("update_proj_gap", 200, "called max_gap"),
        ("wd", 0.1, "called weight_decay"),
        ("maximize", True, "negate the loss"),
        ("amsgrad", True, "no such variant"),
        ("momentum", 0.9, "called betas"),
    ],
)
def test_a_setting_of_another_optimizer_is_an_error(key, value, words):
    with pytest.raises(ConfigError, match=rf"group 0\.{key}: got {value}; .*{words}"):
        group_with(**{key: value})


def test_groups_of_torchs_adamw_are_taken_over():
    theirs = torch.optim.AdamW([nn.Parameter(gaussian(8, 6))], lr=0.3)
    ours = AdaRankGrad(theirs.param_groups)
    assert ours.param_groups[0]["lr"] == 0.3


def test_an_unknown_key_is_told_once_and_kept():
    with pytest.warns(
        UserWarning, match="parameter group 0: 'flavour': kept for whoever reads it"
    ) as told:
        group = group_with(flavour=3)
    assert len(told) == 1 and group["flavour"] == 3


def test_only_groups_may_have_keys_of_others():
    with pytest.raises(ConfigError, match=r"AdaRankGrad\.lr_scale: unknown key"):
        AdaRankGrad([nn.Parameter(gaussian(8, 6))], lr_scale=0.5)


def test_keys_of_others_outlive_saving_and_loading(tmp_path):
    first, second = (optimizer_of(gaussian(8, 6)) for _ in range(2))
    for optimizer in (first, second):
        optimizer.add_param_group({"params": [nn.Parameter(gaussian(5))], "name": "rest"})
        feed(optimizer, gaussian(8, 6), gaussian(5))
    second.load_state_dict(first.state_dict())
    assert second.param_groups[1]["name"] == "rest"
    save(tmp_path / "c", first)
    load(tmp_path / "c", second)
    assert second.param_groups[1]["name"] == "rest"


class Sharpness(torch.optim.Optimizer):
    """Wraps an optimizer like SAM: its own group keys, then the other one on the same groups."""

    def __init__(self, params, base, rho=0.05, **kwargs):
        super().__init__(params, dict(rho=rho, adaptive=False, **kwargs))
        self.base = base(self.param_groups, **kwargs)
        self.param_groups = self.base.param_groups


def test_a_wrapper_may_put_all_settings_into_the_groups():
    settings = {"lr": 0.2, "max_rank": 0.5, "collective_timeout": 60.0, "state_budget": "1MiB"}
    wrapper = Sharpness([nn.Parameter(gaussian(8, 6))], AdaRankGrad, **settings)
    assert wrapper.param_groups[0]["rho"] == 0.05 and wrapper.param_groups[0]["max_rank"] == 0.5
    feed(wrapper.base, gaussian(8, 6))


# -- settings that are tensors ---------------------------------------------------------------------


def ends(*settings: dict, fill=None) -> list[torch.Tensor]:
    """Weights after two steps; between them `fill` is called with the optimizer."""
    found = []
    for each in settings:
        optimizer = optimizer_of(gaussian(8, 6), gaussian(5), **each)
        for seed in (1, 2):
            feed(optimizer, gaussian(8, 6, seed=seed), gaussian(5, seed=seed))
            if fill is not None and seed == 1:
                fill(optimizer)
        found.append(torch.cat([each.detach().reshape(-1) for each in parameters_of(optimizer)]))
    return found


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_tensor_as_learning_rate_is_a_number(shape):
    number = torch.tensor(0.25).item()
    assert torch.equal(*ends({"lr": number}, {"lr": torch.full(shape, 0.25)}))


def test_what_fills_the_learning_rate_is_followed():
    lr = torch.tensor(0.25)

    def fill(optimizer):
        assert optimizer.param_groups[0]["lr"] is lr
        lr.fill_(0.0)

    def assign(optimizer):
        optimizer.param_groups[0]["lr"] = 0.0

    [filled], [assigned], [kept] = (
        ends({"lr": lr}, fill=fill), ends({"lr": 0.25}, fill=assign), ends({"lr": 0.25})
    )  # fmt: skip
    assert torch.equal(filled, assigned) and not torch.equal(filled, kept)


def test_betas_and_other_settings_may_be_tensors_too():
    beta, decay = torch.tensor(0.5), torch.tensor(0.25)
    settings = {"betas": (beta, torch.tensor(0.75)), "weight_decay": decay, "lr": 0.1}
    numbers = {"betas": (0.5, 0.75), "weight_decay": 0.25, "lr": 0.1}
    assert torch.equal(*ends(settings, numbers))

    def fill(optimizer):
        beta.fill_(0.0)
        decay.fill_(0.0)

    def assign(optimizer):
        optimizer.param_groups[0].update(betas=(0.0, 0.75), weight_decay=0.0)

    assert torch.equal(*ends(settings, fill=fill), *ends(numbers, fill=assign))


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_tensor_of_several_numbers_is_refused(name):
    with pytest.raises(ConfigError, match=rf"AdaRankGrad\.{name}: got a tensor of shape \(2,\)"):
        optimizer_of(gaussian(8, 6), **{name: torch.tensor([0.1, 0.2])})
    with pytest.raises(ConfigError, match=rf"AdaRankGrad\.{name}: .*got -1"):
        optimizer_of(gaussian(8, 6), **{name: torch.tensor(-1.0)})


SCHEDULERS = [
    lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
    lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=8),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
]


@pytest.mark.parametrize("make", SCHEDULERS)
@pytest.mark.parametrize("through_group", [False, True])
def test_schedulers_fill_it_in_place(make, through_group):
    runs = []
    for lr in (0.25, torch.tensor(0.25)):
        weights = [("w", nn.Parameter(gaussian(8, 6)))]
        given = [{"params": weights, "lr": lr}] if through_group else weights
        optimizer = AdaRankGrad(given, max_rank=0.5, **({} if through_group else {"lr": lr}))
        scheduler = make(optimizer)
        for seed in range(6):
            feed(optimizer, gaussian(8, 6, seed=seed))
            scheduler.step()
        runs.append(weights[0][1].detach())
        assert optimizer.param_groups[0]["lr"] is lr or not torch.is_tensor(lr)
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("fails", [False, True])
def test_a_checkpoint_fills_it_in_place(tmp_path, fails):
    first = optimizer_of(gaussian(8, 6), lr=torch.tensor(0.25), betas=(0.5, 0.75))
    feed(first, gaussian(8, 6))
    save(tmp_path / "c", first)
    lr, beta = torch.tensor(0.5), torch.tensor(0.25)
    view = {"max_rank": 6} if fails else {}
    second = optimizer_of(gaussian(8, 6), lr=lr, betas=(beta, torch.tensor(0.5)), **view)
    second.param_groups[0]["low_rank"] = not fails
    if fails:
        with pytest.raises(Exception, match="is trained with full-rank Adam now"):
            load(tmp_path / "c", second)
    else:
        with pytest.warns(UserWarning, match="betas"):
            load(tmp_path / "c", second)
    assert second.param_groups[0]["lr"] is lr and second.param_groups[0]["betas"][0] is beta
    assert (lr.item(), beta.item()) == ((0.5, 0.25) if fails else (0.25, 0.5))


def test_groups_of_a_model_share_the_tensor():
    lr = torch.tensor(0.25)
    optimizer = AdaRankGrad(param_groups(nn.Sequential(nn.Linear(8, 6), nn.Embedding(4, 8)), lr=lr))
    assert all(group["lr"] is lr for group in optimizer.param_groups)
