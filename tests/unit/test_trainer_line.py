"""What `for_trainer` hands to the Trainer, and what the callback adds to its logs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
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


@pytest.mark.parametrize("every", [0, -1, 2.0, "10"])
def test_every_is_a_number_of_steps(every: Any) -> None:
    with pytest.raises(ConfigError, match="every: got"):
        AdaRankGradCallback(every)
