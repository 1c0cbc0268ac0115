"""Saving and preparing by libraries: for every AdaRankGrad that they get, however they get it."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import Trainer

from arg_dist import AdaRankGrad, ConfigError, prepare
from arg_dist.engines import deepspeed_guard
from arg_dist.engines.patching import is_wrapped
from arg_dist.integrations import preparing
from arg_dist.integrations.saving import TRAINER_SAVES, optimizers_in
from arg_dist.library_internals import SAVE_OPTIMIZER, SAVE_STATE

pytestmark = pytest.mark.unit


def ours(count: int = 1) -> Any:
    built = [AdaRankGrad([("weight", nn.Parameter(torch.ones(6, 4)))]) for _ in range(count)]
    return built if count > 1 else built[0]


class Wrapper(torch.optim.Optimizer):
    """An optimizer around others, under a name of its own."""

    def __init__(self, *inner: Any) -> None:
        self.base_optimizer, *self.others = inner
        self.by_name = {"again": self.base_optimizer}


def test_every_optimizer_inside_of_others_is_found_once() -> None:
    first, second, third = ours(3)
    holder = SimpleNamespace(optimizer=Wrapper(first, Wrapper(second)), log=[third])
    assert optimizers_in(holder, first) == [first, second, third]
    holder.self = holder
    assert optimizers_in(holder, SimpleNamespace(state_dict=dict), 3) == [first, second, third]
    assert optimizers_in(torch.optim.SGD([torch.ones(1)])) == []


def test_a_built_optimizer_makes_the_libraries_gather_state() -> None:
    class Overriding(Trainer):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            """Not as the Trainer does it."""

    ours()
    assert is_wrapped(Accelerator, SAVE_STATE)
    assert all(is_wrapped(Trainer, each) for each in TRAINER_SAVES)
    assert is_wrapped(Overriding, SAVE_OPTIMIZER)

    class Later(Overriding):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            """Defined when the optimizer exists."""

    optimizer = ours()
    del optimizer
    late = ours()
    for parameter in late.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    late.step()
    assert is_wrapped(Later, SAVE_OPTIMIZER)


@pytest.fixture
def consolidated(monkeypatch: pytest.MonkeyPatch) -> list[AdaRankGrad]:
    """The optimizers whose state was gathered."""
    found: list[AdaRankGrad] = []
    monkeypatch.setattr(AdaRankGrad, "consolidate_state_dict", lambda self: found.append(self))
    return found


@pytest.mark.parametrize("name", [each.name for each in TRAINER_SAVES])
@pytest.mark.parametrize("deepspeed", [False, True])
def test_the_trainer_gathers_before_it_saves(
    consolidated: list[AdaRankGrad], name: str, deepspeed: bool
) -> None:
    class Saving(Trainer):
        __init__ = object.__init__
        is_deepspeed_enabled = deepspeed

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            self.saved = list(consolidated)

        _tune_save_checkpoint = _save_optimizer_and_scheduler

    optimizer = ours()
    trainer = Saving()
    trainer.optimizer = SimpleNamespace(optimizer=optimizer)
    getattr(trainer, name)("folder")
    assert trainer.saved == ([] if deepspeed else [optimizer])


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_accelerate_gathers_all_that_it_saves(
    consolidated: list[AdaRankGrad], accelerator: Accelerator, tmp_path: Any
) -> None:
    first, second, third = ours(3)
    accelerator.prepare(nn.Linear(2, 2), first)
    accelerator.prepare_optimizer(second)
    accelerator.register_for_checkpointing(third)
    accelerator.save_state(str(tmp_path))
    assert consolidated == [first, second, third]


def test_prepare_takes_models_and_optimizers_in_any_order(accelerator: Accelerator) -> None:
    first, second = ours(2)
    adamw = torch.optim.AdamW([torch.ones(1)])
    prepared = prepare(accelerator, first, nn.Linear(2, 2), adamw, second, nn.Linear(2, 2))
    assert (prepared[0].optimizer, prepared[3].optimizer) == (first, second)
    with pytest.raises(ConfigError, match="is AdamW, not AdaRankGrad"):
        prepare(accelerator, nn.Linear(2, 2), torch.optim.AdamW([torch.ones(1)]))


def test_an_optimizer_that_has_trained_can_be_prepared_again(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = ours()
    accelerator.prepare(optimizer)
    optimizer.param_groups[0]["params"][0].grad = torch.randn(6, 4)
    optimizer.step()
    accelerator.free_memory()

    def refuses(self: AdaRankGrad) -> None:
        raise RuntimeError("its state is sharded")

    monkeypatch.setattr(AdaRankGrad, "state_dict", refuses)
    again = accelerator.prepare(optimizer)
    assert isinstance(again, AcceleratedOptimizer) and again.device_placement
    assert optimizer.stats()[0]["rank"] > 0


class Engine:
    """An accelerator of another kind, which prepares as `prepares` says."""

    num_processes = 1
    device = torch.device("cpu")

    def __init__(self, kind: str, prepares: Any = lambda *given: given) -> None:
        self.distributed_type = SimpleNamespace(value=kind)
        self.state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=2))
        self.prepares = prepares

    def prepare(self, *given: Any) -> Any:
        return preparing._prepare(lambda self, *given: self.prepares(*given), self, *given)

    def prepare_optimizer(self, optimizer: Any) -> Any:
        return preparing._prepare_optimizer(lambda self, given: given, self, optimizer)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (lambda: [ours()], r"prepare: got an AdaRankGrad without its model"),
        (lambda: [nn.Linear(2, 2), *ours(2)], r"got 2 optimizers in one call, .*only the last"),
        (
            lambda: [nn.Linear(2, 2), torch.optim.SGD([torch.ones(1)]), ours()],
            r"got 2 optimizers in one call",
        ),
    ],
)
def test_what_accelerate_would_not_pass_on_is_refused(given: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Engine("DEEPSPEED").prepare(*given())


def test_a_second_deepspeed_engine_is_refused() -> None:
    engine = Engine("DEEPSPEED")
    engine.deepspeed_engine_wrapped = object()
    with pytest.raises(ConfigError, match=r"has a DeepSpeed engine .*would step only that one"):
        engine.prepare(nn.Linear(2, 2), ours())


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_an_optimizer_without_its_model_is_refused_where_parameters_are_replaced(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"without its model, under {kind}.*prepare\(model, "):
        Engine(kind).prepare_optimizer(ours())
    adamw = torch.optim.AdamW([torch.ones(1)])
    assert Engine(kind).prepare_optimizer(adamw) is adamw
    optimizer = ours()
    assert Engine("MULTI_CPU").prepare_optimizer(optimizer) is optimizer


def test_another_optimizer_that_comes_back_is_refused() -> None:
    adamw = torch.optim.AdamW([torch.ones(1)])
    with pytest.raises(ConfigError, match="is AdamW, not AdaRankGrad"):
        Engine("MULTI_CPU", lambda *given: (given[0], adamw)).prepare(nn.Linear(2, 2), ours())
    other = ours()
    with pytest.raises(ConfigError, match="another AdaRankGrad took the place of argument 1"):
        Engine("MULTI_CPU", lambda *given: (given[0], other)).prepare(nn.Linear(2, 2), ours())


def test_processes_that_accelerate_does_not_count_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"accelerate counts 1 process.* where 2 were"):
        Engine("NO").prepare(nn.Linear(2, 2), ours())


def test_deepspeed_imported_after_the_optimizer_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine_module = SimpleNamespace(DeepSpeedEngine=type("Engine", (), {}))
    comm = SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.engine", engine_module)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(comm=comm))
    with pytest.raises(RuntimeError, match="DeepSpeed was imported after the AdaRankGrad was"):
        deepspeed_guard.refuse_unguarded()
    comm.is_initialized = lambda: False
    deepspeed_guard.refuse_unguarded()
