"""What `for_trainer` hands to the Trainer, and what the callback adds to its logs."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, TrainerCallback

import arg_dist
from arg_dist import ConfigError
from arg_dist.integrations.callback import AdaRankGradCallback
from tests.one_process import feed, optimizer_of


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=3e-3,
        adam_beta1=0.8,
        adam_epsilon=1e-6,
        weight_decay=0.1,
        use_cpu=True,
    )


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)


def build(args: TrainingArguments, **settings: Any) -> arg_dist.AdaRankGrad:
    """What the Trainer does with the pair."""
    factory, chosen = arg_dist.for_trainer(args, max_rank=4, **settings)
    return factory()(Small(), **chosen)


def test_learning_rate_betas_and_decay_are_those_of_the_arguments(args: TrainingArguments) -> None:
    for group in build(args).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.8, 0.999), 1e-6)
        vectors = all(parameter.dim() < 2 for parameter in group["params"])
        assert group["weight_decay"] == (0.0 if vectors else 0.1)


def test_settings_go_before_the_arguments(args: TrainingArguments) -> None:
    assert build(args, lr=1e-2, weight_decay=0.0).param_groups[0]["lr"] == 1e-2


CHANGES = {
    "learning_rate": ("lr", 7e-3),
    "adam_beta1": ("betas", (0.7, 0.999)),
    "adam_beta2": ("betas", (0.8, 0.7)),
    "adam_epsilon": ("eps", 1e-5),
    "weight_decay": ("weight_decay", 0.3),
}


@pytest.mark.parametrize("argument", CHANGES)
def test_arguments_are_read_when_the_optimizer_is_built(
    args: TrainingArguments, argument: str
) -> None:
    factory, chosen = arg_dist.for_trainer(args, max_rank=4)
    key, expected = CHANGES[argument]
    for value in (0.01, 0.7 if "beta" in argument else expected):  # one trial after the other
        setattr(args, argument, value)
        built = factory()(Small(), **chosen)
    assert built.param_groups[0][key] == expected


def test_a_trainer_may_pass_its_arguments_with_the_model(args: TrainingArguments) -> None:
    factory, chosen = arg_dist.for_trainer(args, max_rank=4)
    its_own = copy.copy(args)
    its_own.learning_rate = 7e-3
    assert factory()(Small(), its_own, **chosen).param_groups[0]["lr"] == 7e-3


@pytest.mark.parametrize("given", [{"lr": 1e-2}, {"lr": 1e-2, "betas": (0.5, 0.6)}])
def test_a_change_without_effect_is_told(args: TrainingArguments, given: dict[str, Any]) -> None:
    factory, chosen = arg_dist.for_trainer(args, max_rank=4, **given)
    args.learning_rate = 0.3
    with pytest.warns(UserWarning, match=r"for_trainer: lr=0.01 .* 0.003 to 0.3 has no effect"):
        group = factory()(Small(), **chosen).param_groups[0]
    assert {key: group[key] for key in given} == given


def trainer_of(args: TrainingArguments, pair: tuple[Any, dict[str, Any]]) -> Trainer:
    """What a Trainer needs to build its optimizer."""
    trainer = Trainer.__new__(Trainer)
    trainer.args, trainer.model, trainer.optimizer = args, Small(), None
    trainer.optimizer_cls_and_kwargs = pair
    return trainer


def test_the_arguments_that_a_trainer_has_put_in_place_of_the_given_ones_count(
    args: TrainingArguments,
) -> None:
    trainer = trainer_of(copy.copy(args), arg_dist.for_trainer(args))
    trainer.args.learning_rate = 9e-3
    trainer.create_optimizer()
    assert trainer.optimizer.param_groups[0]["lr"] == 9e-3
    other = trainer_of(args, arg_dist.for_trainer(args))
    other.create_optimizer()
    assert other.optimizer.param_groups[0]["lr"] == 3e-3


def test_arguments_that_have_become_wrong_are_refused(args: TrainingArguments) -> None:
    pair = arg_dist.for_trainer(args)
    args.adam_beta2 = 1.5
    with pytest.raises(ConfigError, match=r"for_trainer\.betas"):
        trainer_of(args, pair).create_optimizer()


def test_processes_that_do_not_know_of_each_other_are_refused_when_it_is_built(
    args: TrainingArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = arg_dist.for_trainer(args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"counts 1 process.* where 2 were started"):
        trainer_of(args, pair).create_optimizer()


def test_the_default_optim_of_the_arguments_does_not_matter(args: TrainingArguments) -> None:
    assert args.optim.startswith("adamw")
    assert isinstance(build(args), arg_dist.AdaRankGrad)


def test_patterns_choose_the_low_rank_matrices(args: TrainingArguments) -> None:
    optimizer = build(args, targets=["first"])
    low_rank = [group["param_names"] for group in optimizer.param_groups if group["low_rank"]]
    assert low_rank == [["first.weight"]]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_rnk": 4}, "for_trainer.max_rnk"),
        ({"energy": 2.0}, "for_trainer.energy"),
    ],
)
def test_a_wrong_setting_is_refused_when_it_is_written(
    args: TrainingArguments, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        arg_dist.for_trainer(args, **settings)


def test_an_optimizer_in_the_deepspeed_json_too_is_refused(args: TrainingArguments) -> None:
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"optimizer": {}})
    with pytest.raises(ConfigError, match="JSON has this section"):
        arg_dist.for_trainer(args)


# -- the callback --------------------------------------------------------------------------------


class Reporter(TrainerCallback):
    """Stands where TensorBoard's callback stands: before those that a user gives."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        self.seen.append(dict(logs))


class Training:
    """The Trainer's calls, with nothing between them."""

    def __init__(self, args: TrainingArguments, callback: AdaRankGradCallback) -> None:
        self.args, self.reporter = args, Reporter()
        self.optimizer = optimizer_of(torch.randn(12, 16), torch.randn(16, 20), max_rank=6)
        handler = [DefaultFlowCallback, self.reporter, callback]
        wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=self.optimizer))
        self.handler = CallbackHandler(handler, None, None, wrapped, None)
        self.state, self.control = TrainerState(), TrainerControl()

    def begin(self, step: int = 0) -> None:
        self.state.global_step = step
        self.handler.on_train_begin(self.args, self.state, self.control)

    def step(self, logs: dict[str, float] | None, *, should_log: bool = True) -> None:
        feed(self.optimizer, torch.randn(12, 16), torch.randn(16, 20))
        self.state.global_step += 1
        if logs is not None:
            self.control.should_log = should_log
            self.state.log_history.append({**logs, "step": self.state.global_step})
            self.handler.on_log(self.args, self.state, self.control, logs)


OWN = {
    "rank_mean",
    "rank_min",
    "rank_max",
    "energy_mean",
    "optimizer_state_bytes",
    "optimizer_state_share",
    "optimizer_sent_bytes",
    "optimizer_collectives",
}


def test_numbers_are_there_before_anything_reports_them(args: TrainingArguments) -> None:
    training = Training(args, AdaRankGradCallback())
    training.begin()
    training.step({"loss": 1.0})
    [logs] = training.reporter.seen
    assert set(logs) == {"loss"} | OWN
    ranks = [entry["rank"] for entry in training.optimizer.stats()]
    energies = [entry["energy"] for entry in training.optimizer.stats()]
    assert (logs["rank_min"], logs["rank_max"]) == (min(ranks), max(ranks))
    assert (logs["rank_mean"], logs["energy_mean"]) == (sum(ranks) / 2, sum(energies) / 2)
    assert logs["optimizer_state_bytes"] == training.optimizer.state_bytes()
    assert logs["optimizer_state_share"] == training.optimizer.state_bytes() / (8 * (192 + 320))
    assert logs["optimizer_sent_bytes"] == logs["optimizer_collectives"] == 0
    assert training.state.log_history[-1] == {**logs, "step": 1}


def test_ranks_of_matrices_are_logged_on_request(args: TrainingArguments) -> None:
    training = Training(args, AdaRankGradCallback(matrices=True))
    training.begin()
    training.step({"loss": 1.0})
    stats = {f"rank/{entry['name']}": entry["rank"] for entry in training.optimizer.stats()}
    assert set(training.reporter.seen[0]) == {"loss"} | OWN | set(stats)
    assert stats.items() <= training.reporter.seen[0].items()


def test_every_is_the_fewest_steps_between_two_logs_with_numbers(args: TrainingArguments) -> None:
    training = Training(args, AdaRankGradCallback(every=3))
    training.begin(step=10)  # resumed
    for _ in range(7):
        training.step({"loss": 1.0})
    assert [i for i, logs in enumerate(training.reporter.seen, 11) if "rank_mean" in logs] == [
        13,
        16,
    ]


def test_other_logs_are_left_alone(args: TrainingArguments) -> None:
    training = Training(args, AdaRankGradCallback())
    training.step({"loss": 1.0})  # no training has begun
    training.begin()
    training.step({"eval_loss": 1.0})
    training.step({"loss": 1.0}, should_log=False)  # somebody's own, maybe on one process only
    training.handler.on_train_end(training.args, training.state, training.control)
    training.step({"loss": 1.0})
    assert all(len(logs) == 1 for logs in training.reporter.seen)


def test_bytes_and_collectives_are_per_step_since_the_last_log(
    args: TrainingArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(args, AdaRankGradCallback())
    monkeypatch.setattr(training.optimizer, "comm_bytes", lambda: 50)
    monkeypatch.setattr(training.optimizer, "collectives", lambda: 7)
    training.begin(step=2)
    monkeypatch.setattr(training.optimizer, "comm_bytes", lambda: 90)
    monkeypatch.setattr(training.optimizer, "collectives", lambda: 13)
    training.step(None)
    training.step({"loss": 1.0})
    assert training.reporter.seen[0]["optimizer_sent_bytes"] == 20
    assert training.reporter.seen[0]["optimizer_collectives"] == 3


def test_a_second_callback_changes_nothing(args: TrainingArguments) -> None:
    AdaRankGradCallback()
    training = Training(args, AdaRankGradCallback())
    training.begin()
    training.step({"loss": 1.0})
    assert len(training.reporter.seen) == 1


def test_another_optimizer_is_refused_when_training_begins(args: TrainingArguments) -> None:
    training = Training(args, AdaRankGradCallback())
    training.handler.optimizer = SimpleNamespace(optimizer=torch.optim.AdamW(Small().parameters()))
    with pytest.raises(ConfigError, match="AdamW trains this model, not AdaRankGrad"):
        training.begin()


def test_processes_that_do_not_know_of_each_other_are_refused(
    args: TrainingArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(args, AdaRankGradCallback())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"counts 1 process.* where 2 were started"):
        training.begin()


# -- without the callback ------------------------------------------------------------------------


def begin_without_callback(
    args: TrainingArguments, model: nn.Module | None, optimizer: Any
) -> None:
    handler = CallbackHandler([DefaultFlowCallback], model, None, optimizer, None)
    handler.on_train_begin(args, TrainerState(), TrainerControl())


@pytest.mark.parametrize(
    ("argument", "key"), [("learning_rate", "lr"), ("adam_beta1", "betas"), ("weight_decay", None)]
)
def test_arguments_that_changed_after_the_json_took_them_are_refused(
    args: TrainingArguments, argument: str, key: str | None
) -> None:
    optimizer = optimizer_of(torch.randn(12, 16))
    params = {"lr": 3e-3, "betas": [0.8, 0.999], "eps": "auto", "max_rank": 4}
    section = {"type": "AdaRankGrad", "params": params}
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"optimizer": section})
    begin_without_callback(args, None, optimizer)
    setattr(args, argument, 0.5)
    if key is None:  # the JSON does not have it
        begin_without_callback(args, None, optimizer)
        return
    with pytest.raises(ConfigError, match=rf"optimizer\.params\.{key}: the DeepSpeed JSON has"):
        begin_without_callback(args, None, optimizer)


def test_an_optimizer_of_a_model_that_was_changed_is_refused(args: TrainingArguments) -> None:
    model = Small()
    optimizer = arg_dist.AdaRankGrad(arg_dist.param_groups(model))
    begin_without_callback(args, model, SimpleNamespace(optimizer=optimizer))
    model.requires_grad_(False)  # as adapters do
    model.adapter = nn.Linear(3, 3)
    with pytest.raises(ConfigError, match=r"none of the model's parameters .*for_trainer"):
        begin_without_callback(args, model, SimpleNamespace(optimizer=optimizer))


def test_processes_are_counted_without_the_callback_too(
    args: TrainingArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = optimizer_of(torch.randn(12, 16))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"counts 1 process.* where 2 were started"):
        begin_without_callback(args, None, optimizer)
    begin_without_callback(args, None, torch.optim.AdamW(Small().parameters()))


@pytest.mark.parametrize("every", [0, -1, 2.0, "10"])
def test_every_is_a_number_of_steps(every: Any) -> None:
    with pytest.raises(ConfigError, match="every: got"):
        AdaRankGradCallback(every)
