"""What a job gives to `save` is what `load` returns: schedulers, its own data, group settings."""

from __future__ import annotations

import functools
import io
import json
import math
import threading
import warnings
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matrices import gaussian
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim.swa_utils import SWALR
from transformers import optimization

import arg_dist
from arg_dist import AdaRankGrad, ConfigError
from arg_dist.checkpoint import CheckpointError, Checkpoints, load, save
from arg_dist.checkpoint import index as index_of
from arg_dist.checkpoint.index import INDEX_NAME, read_index
from arg_dist.checkpoint.scheduling import retyped

STOP, STEPS = 4, 14


class Decay:
    """A factor with a state, as :class:`LambdaLR` saves it."""

    def __init__(self) -> None:
        self.drops, self.seen = {3: 0.5, 8: 0.1}, (0, 1.0)

    def __call__(self, step: int) -> float:
        self.seen = (step, self.drops.get(step, self.seen[1]))
        return self.seen[1]


class Attributes(torch_schedulers.LRScheduler):
    """A scheduler with functions among its attributes, which a state cannot have."""

    def __init__(self, optimizer: Any) -> None:
        self.rule, self.half = (lambda step: 0.9**step), functools.partial(pow, 0.5)
        self.best = math.inf
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        self.best = min(self.best, self.rule(self.last_epoch))
        return [rate * self.best for rate in self.base_lrs]


def sequential(optimizer: Any) -> Any:
    first = torch_schedulers.LinearLR(optimizer, 0.1, total_iters=2)
    rest = torch_schedulers.MultiStepLR(optimizer, [3, 6])
    return torch_schedulers.SequentialLR(optimizer, [first, rest], milestones=[2])


def chained(optimizer: Any) -> Any:
    parts = torch_schedulers.ConstantLR(optimizer), torch_schedulers.MultiStepLR(optimizer, [6, 9])
    return torch_schedulers.ChainedScheduler(list(parts))


S, H = torch_schedulers, optimization
SCHEDULERS = {
    "MultiStepLR": lambda o: S.MultiStepLR(o, [5, 9, 9]),
    "StepLR": lambda o: S.StepLR(o, 4, gamma=0.5),
    "ConstantLR": lambda o: S.ConstantLR(o, 0.5, 6),
    "LinearLR": lambda o: S.LinearLR(o, 0.1, total_iters=8),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 12),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 12),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 4, 2),
    "CyclicLR": lambda o: S.CyclicLR(o, 1e-3, 1e-2, step_size_up=3, mode="exp_range", gamma=0.9),
    "CyclicLR, a rule": lambda o: S.CyclicLR(o, 1e-3, 1e-2, step_size_up=3, scale_fn=Decay()),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 1e-2, total_steps=STEPS + 1),
    "LambdaLR": lambda o: S.LambdaLR(o, lambda step: 0.9**step),
    "LambdaLR, an object": lambda o: S.LambdaLR(o, Decay()),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, Decay()),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "ReduceLROnPlateau, new": lambda o: S.ReduceLROnPlateau(o, patience=20, min_lr=[1e-3]),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=6),
    "functions": Attributes,
    "constant": H.get_constant_schedule,
    "plateau": lambda o: H.get_reduce_on_plateau_schedule(o, patience=1),
    "warmup": lambda o: H.get_constant_schedule_with_warmup(o, 6),
    "linear": lambda o: H.get_linear_schedule_with_warmup(o, 2, 12),
    "cosine": lambda o: H.get_cosine_schedule_with_warmup(o, 2, 12),
    "restarts": lambda o: H.get_cosine_with_hard_restarts_schedule_with_warmup(o, 2, 12, 2),
    "polynomial": lambda o: H.get_polynomial_decay_schedule_with_warmup(o, 2, 12),
    "inverse root": lambda o: H.get_inverse_sqrt_schedule(o, 3),
    "least": lambda o: H.get_cosine_with_min_lr_schedule_with_warmup(o, 2, 12, min_lr=1e-3),
    "wsd": lambda o: H.get_wsd_schedule(
        o, num_warmup_steps=2, num_decay_steps=4, num_stable_steps=4
    ),
}
if hasattr(H, "get_greedy_schedule"):  # transformers 5
    SCHEDULERS["greedy"] = lambda o: H.get_greedy_schedule(o, patience=1)


def build(**settings: Any) -> AdaRankGrad:
    weights = {"w": gaussian(12, 16, seed=0), "b": gaussian(12, seed=1)}
    named = [(name, torch.nn.Parameter(weight)) for name, weight in weights.items()]
    return AdaRankGrad(named, **{"lr": 1e-2, "max_rank": 4, "min_rank": 1, **settings})


def step(optimizer: AdaRankGrad, number: int = 0) -> None:
    for seed, parameter in enumerate(optimizer.param_groups[0]["params"]):
        parameter.grad = gaussian(*parameter.shape, seed=10 * number + seed)
    optimizer.step()


def rates(optimizer: AdaRankGrad, scheduler: Any, first: int, last: int) -> list[Any]:
    seen = []
    for number in range(first, last):
        step(optimizer, number)
        by_metric = "Plateau" in type(scheduler).__name__ or "Greedy" in type(scheduler).__name__
        scheduler.step(1.0 if number < 3 else 2.0) if by_metric else scheduler.step()
        group = optimizer.param_groups[0]
        seen.append((float(group["lr"]), tuple(map(float, group["betas"]))))
    return seen


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_goes_on_as_if_uninterrupted(tmp_path, name):
    make = SCHEDULERS[name]
    optimizer = build()
    scheduler = make(optimizer)
    rates(optimizer, scheduler, 0, STOP)
    Checkpoints(tmp_path, optimizer, scheduler=scheduler, background=False).save(STOP)
    expected = rates(optimizer, scheduler, STOP, STEPS)
    resumed = build()
    again = make(resumed)
    assert load(tmp_path / f"step-{STOP:08d}", resumed, scheduler=again).step == STOP
    assert rates(resumed, again, STOP, STEPS) == expected


def test_a_scheduler_that_cannot_be_saved_is_refused_before_the_first_step(tmp_path):
    optimizer = build()
    rule = SimpleNamespace(model=torch.nn.Linear(1, 1))
    state = {"last_epoch": 1, "rules": [{"drop": rule}]}
    scheduler = SimpleNamespace(state_dict=lambda: state)
    words = r"scheduler.rules\[0\].drop: got a value of type types.SimpleNamespace, "
    with pytest.raises(CheckpointError, match=words):
        Checkpoints(tmp_path, optimizer, scheduler=scheduler)
    with pytest.raises(CheckpointError, match=words):
        save(tmp_path / "one", optimizer, scheduler=scheduler)
    assert not (tmp_path / "one").exists()


def test_a_scheduler_that_has_no_state_yet_is_told_when_saving(tmp_path):
    optimizer = build()
    scheduler = SimpleNamespace(state_dict=lambda: {}["state"])
    checkpoints = Checkpoints(tmp_path, optimizer, scheduler=scheduler, background=False)
    with pytest.raises(CheckpointError, match="KeyError: 'state'"):
        checkpoints.save(1)


def test_a_scheduler_on_one_side_alone_is_told(tmp_path):
    optimizer = build()
    save(tmp_path / "without", optimizer)
    save(tmp_path / "with", optimizer, scheduler=S.StepLR(optimizer, 2))
    with pytest.warns(UserWarning, match="the job has the state of a scheduler and it has none"):
        load(tmp_path / "without", optimizer, scheduler=S.StepLR(optimizer, 2))
    with pytest.warns(UserWarning, match="it has the state of a scheduler and the job has none"):
        load(tmp_path / "with", optimizer)


# -- the job's own data ----------------------------------------------------------------------------


def test_a_save_in_the_background_holds_what_was_there_when_it_began(tmp_path, monkeypatch):
    may_write = threading.Event()
    write = Checkpoints._write
    held = lambda *given: may_write.wait(30) and write(*given)  # noqa: E731
    monkeypatch.setattr(Checkpoints, "_write", held)
    model = torch.nn.BatchNorm1d(3)
    model.config = SimpleNamespace(to_dict=lambda: values)
    values = {"layers": [1], "dtype": torch.bfloat16, "id2label": {0: "a"}, "limit": math.inf}
    model.register_buffer("expanded", torch.ones(1).expand(4))
    optimizer = build()
    step(optimizer)
    scheduler = S.MultiStepLR(optimizer, [2])
    job: dict[str, Any] = {
        "history": [1.0, math.inf],
        "seen": {0: {"n": (1, 2)}},
        "at": np.arange(3),
    }
    checkpoints = Checkpoints(tmp_path, optimizer, model=model, scheduler=scheduler)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = [value.clone() for value in optimizer.param_groups[0]["params"]]
    drawn = torch.get_rng_state()
    checkpoints.save(1, job=job)
    # training goes on before anything is written
    job["history"].append("later")
    job["seen"][0]["n"], job["later"] = "later", 1
    job["at"] += 1
    values["layers"].append(2)
    optimizer.param_groups[0]["energy"] = 0.5
    step(optimizer, 1)
    scheduler.milestones[7] = 7
    scheduler.step()
    model.running_mean += 1
    model.expanded = torch.zeros(4)
    torch.rand(3)
    may_write.set()
    checkpoints.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        restored = checkpoints.load()
    given = {"history": [1.0, math.inf], "seen": {0: {"n": (1, 2)}}, "at": [0, 1, 2]}
    assert {**restored.job, "at": restored.job["at"].tolist()} == given
    assert restored.job["at"].dtype == job["at"].dtype
    assert (scheduler.milestones, scheduler.last_epoch) == (Counter({2: 1}), 0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(map(torch.equal, optimizer.param_groups[0]["params"], weights))
    assert optimizer.calls == 1 and optimizer.param_groups[0]["energy"] == 0.65
    assert torch.equal(torch.get_rng_state(), drawn)
    config = read_index(restored.path).model_config_values
    plain = {"layers": [1], "dtype": "bfloat16", "id2label": {"0": "a"}, "limit": math.inf}
    assert config == {**plain, "architectures": ["BatchNorm1d"]}


def test_what_cannot_come_back_is_refused_when_saving(tmp_path):
    optimizer = build()
    with pytest.raises(CheckpointError, match=r"^job.sampler\[3\]: got a value of type object"):
        save(tmp_path / "one", optimizer, job={"sampler": {3: object()}})
    assert not list(tmp_path.iterdir())


def test_a_configuration_that_is_not_json_is_told_and_left_out(tmp_path):
    model = torch.nn.Linear(2, 2)
    model.config = SimpleNamespace(to_dict=lambda: {"activation": torch.relu})
    with pytest.warns(UserWarning, match="model.config: cannot be written as JSON .*builtin"):
        save(tmp_path / "one", build(), model=model)
    assert read_index(tmp_path / "one").model_config_values is None


# -- settings of the groups ------------------------------------------------------------------------

NUMPY = {
    "lr": np.float32(0.02),
    "weight_decay": np.float64(0.1),
    "betas": (np.float32(0.5), np.float64(0.75)),
    "eps": np.array(1e-6),
    "max_rank": np.int64(3),
    "low_rank": np.bool_(True),
    "residual": np.str_("none"),
}


def types_in(group: dict[str, Any]) -> set[type]:
    values = [value for key, value in group.items() if key not in ("params", "param_names")]
    flat = [each for value in values for each in (value if isinstance(value, tuple) else (value,))]
    return set(map(type, flat))


def test_numpy_settings_are_numbers_from_the_start():
    optimizer = build(**NUMPY)
    group = optimizer.param_groups[0]
    assert types_in(group) <= {bool, int, float, str, type(None)}
    assert group["betas"] == (0.5, 0.75) and group["max_rank"] == 3
    with pytest.raises(ConfigError, match=r"lr: .* greater than or equal to 0, got -1.0"):
        build(lr=np.float32(-1))


@pytest.mark.parametrize("way", ["checkpoint", "state_dict"])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array, torch.tensor])
def test_settings_changed_during_training_are_saved(tmp_path, kind, way):
    optimizer, plain = build(), build()
    numbers = {"lr": 0.5, "weight_decay": 0.125, "eps": 0.0625, "initial_lr": 0.75}
    for key, value in numbers.items():
        optimizer.param_groups[0][key] = kind(value)
        plain.param_groups[0][key] = value
    optimizer.param_groups[0]["betas"] = [kind(0.5), kind(0.75)]
    plain.param_groups[0]["betas"] = (0.5, 0.75)
    for number in range(3):
        step(optimizer, number)
        step(plain, number)
    pairs = zip(optimizer.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    resumed = build()
    if way == "checkpoint":
        save(tmp_path / "one", optimizer)
        with pytest.warns(UserWarning, match=r"betas=\(0.5, 0.75\) instead of \(0.9, 0.999\)"):
            load(tmp_path / "one", resumed)
    else:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
    group = resumed.param_groups[0]
    assert {key: float(group[key]) for key in numbers} == numbers
    assert tuple(map(float, group["betas"])) == (0.5, 0.75)
    step(plain, 3)
    step(resumed, 3)
    assert resumed.calls == plain.calls


def test_a_tensor_that_is_a_setting_gets_the_value_of_the_checkpoint(tmp_path):
    saved = build()
    saved.param_groups[0]["lr"] = torch.tensor(0.5)
    save(tmp_path / "one", saved)
    optimizer = build()
    rate = optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    load(tmp_path / "one", optimizer)
    assert optimizer.param_groups[0]["lr"] is rate and rate == 0.5
    another = build(max_rank=2, side="left")
    rate = another.param_groups[0]["lr"] = torch.tensor(0.25)
    step(saved)
    save(tmp_path / "two", saved)
    index = read_index(tmp_path / "two")
    rewrite(tmp_path / "two", index.model_copy(update={"weights": {}}))
    with pytest.raises(CheckpointError):
        load(tmp_path / "two", another)
    assert another.param_groups[0]["lr"] is rate and rate == 0.25


# -- checkpoints of earlier versions ---------------------------------------------------------------


def rewrite(checkpoint: Any, index: index_of.Index, **envelope: Any) -> None:
    written = json.loads(index_of.index_bytes(index, "arg_dist 0.1"))
    (checkpoint / INDEX_NAME).write_text(json.dumps({**written, **envelope}))


def as_version_1(checkpoint: Any, **values: Any) -> None:
    """Rewrites a checkpoint's index as version 1 wrote it."""
    rewrite(checkpoint, read_index(checkpoint).model_copy(update=values), schema_version=1)


@pytest.mark.parametrize("name", ["MultiStepLR", "SequentialLR", "ChainedScheduler"])
def test_schedules_of_version_1_get_their_steps_back(tmp_path, name):
    optimizer = build()
    scheduler = SCHEDULERS[name](optimizer)
    rates(optimizer, scheduler, 0, STOP)
    save(tmp_path / "one", optimizer, step=STOP, scheduler=scheduler)
    as_version_1(tmp_path / "one", scheduler=json.loads(json.dumps(scheduler.state_dict())))
    expected = rates(optimizer, scheduler, STOP, STEPS)
    resumed = build()
    again = SCHEDULERS[name](resumed)
    load(tmp_path / "one", resumed, scheduler=again)
    assert rates(resumed, again, STOP, STEPS) == expected


def test_data_of_version_1_is_what_it_was_even_if_it_looks_encoded(tmp_path):
    optimizer = build()
    save(tmp_path / "one", optimizer)
    job = {"a": {"$type": "tuple", "value": [[1]]}, "$type": 3, "b": [1, None]}
    as_version_1(tmp_path / "one", job=job)
    assert load(tmp_path / "one", optimizer).job == job


def test_types_of_later_versions_are_refused(tmp_path):
    optimizer = build()
    save(tmp_path / "one", optimizer)
    job = {"a": {"$type": "matrix", "value": 1}}
    rewrite(tmp_path / "one", read_index(tmp_path / "one").model_copy(update={"job": job}))
    with pytest.raises(CheckpointError, match=r"'matrix' are not known .* the version that wrote"):
        load(tmp_path / "one", optimizer)


@pytest.mark.parametrize(
    ("stored", "present", "expected"),
    [
        ({"5": 1}, Counter({5: 1, 9: 1}), Counter({5: 1})),
        ({"0.5": [1]}, {0.25: [2]}, {0.5: [1]}),
        ({"a": [1, 2]}, {"a": (3, 4)}, {"a": (1, 2)}),
        ({"a": [1]}, {"a": (3, 4)}, {"a": (1,)}),
        ({"a": [{"1": 2}]}, {"a": [{3: 4}]}, {"a": [{1: 2}]}),
        ({"best": None, "b": None}, {"best": math.inf, "b": 1.0}, {"best": math.inf, "b": None}),
        ({"a": {}, "new": 1}, {"a": 3}, {"a": {}, "new": 1}),
        ({"x": 1}, {3: 4}, {"x": 1}),
    ],
)
def test_states_of_version_1_get_the_types_of_the_present_ones(stored, present, expected):
    found = retyped(stored, present)
    assert found == expected and repr(found) == repr(expected)


def test_the_index_keeps_integers_of_the_state(tmp_path):
    optimizer = build()
    step(optimizer)
    parameter = optimizer.param_groups[0]["params"][0]
    [state] = optimizer.state[parameter].values()
    state["spectrum"] = [1, 2, 0.5, 1]
    save(tmp_path / "one", optimizer)
    load(tmp_path / "one", optimizer)
    [state] = optimizer.state[parameter].values()
    assert repr(state["spectrum"]) == "[1, 2, 0.5, 1]"


def test_a_checkpoint_is_standard_json(tmp_path):
    save(tmp_path / "one", build(), job={"best": math.inf, "loss": math.nan})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads((tmp_path / "one" / INDEX_NAME).read_text(), parse_constant=refuse)
    assert arg_dist.checkpoint.load(tmp_path / "one", build()).job["best"] == math.inf
