"""No mode of torch around a call reaches what an entry point computes, or is changed by it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from inspect import isfunction
from pathlib import Path
from typing import Any

import ambient_modes
import pytest
import torch
from matrices import gaussian
from tolerances import ROUNDING
from torch import Tensor, nn

import arg_dist
from arg_dist import AdaRankGrad, ConfigError
from arg_dist.checkpoint import Checkpoints
from arg_dist.checkpoint.offline import newest_intact, whole_weight
from arg_dist.checkpoint.slices import SliceReader
from arg_dist.sharding.entry import is_entry_point, plain_mode
from arg_dist.telemetry import sample_optimizer
from tests.installed import QUIET_COMPILER

SETTINGS = {"lr": 0.05, "max_rank": 4, "min_rank": 1, "min_gap": 1, "max_gap": 2, "energy": 0.6}
"""Bases are found in the first two steps and in every second one from there."""


class Model(nn.Module):
    """Weights of several types and shapes, one that is not trained, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall = nn.Linear(16, 8), nn.Linear(8, 20, bias=False)
        self.half = nn.Linear(10, 12, dtype=torch.bfloat16)
        self.double = nn.Linear(6, 9, dtype=torch.float64)
        self.kernel = nn.Conv1d(8, 6, 3)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("count", torch.arange(3))
        for i, parameter in enumerate(self.parameters()):
            parameter.data.copy_(gaussian(*parameter.shape, seed=i))


class Job:
    """A model and its optimizer, in a folder of their own."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.settings = {**SETTINGS, **settings}
        self.model, self.steps = Model(), 0
        self.build()

    def build(self) -> None:
        groups = arg_dist.param_groups(self.model, convolutions=True)
        self.optimizer = AdaRankGrad(groups, **self.settings)

    def gradients(self) -> None:
        """Those of the next step."""
        self.steps += 1
        for i, parameter in enumerate(self.model.parameters()):
            if parameter.requires_grad:
                gradient = gaussian(*parameter.shape, seed=100 * self.steps + i)
                parameter.grad = gradient.to(parameter.dtype)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.gradients()
            self.optimizer.step()

    def found(self) -> list[Any]:
        """Weights and state."""
        return [*self.model.state_dict().values(), self.optimizer.state_dict()]


Action = Callable[[Job], Any]


def trained(job: Job) -> None:
    """A step before the call: the next one finds other bases."""
    job.train(1)
    job.gradients()


def trained_twice(job: Job) -> None:
    """The next step keeps the bases."""
    job.train(2)
    job.gradients()


def untrained(job: Job) -> None:
    job.gradients()


def saved(job: Job) -> None:
    """A checkpoint and a state dictionary, and a job that has neither."""
    trained(job)
    arg_dist.checkpoint.save(job.folder / "step-00000001", job.optimizer, model=job.model)
    job.given = job.optimizer.state_dict()
    start_anew(job)


def start_anew(job: Job) -> None:
    for tensor in job.model.state_dict().values():
        tensor.zero_()
    job.build()


def step(job: Job) -> None:
    job.optimizer.step()


def step_with_closure(job: Job) -> Any:
    return job.optimizer.step(lambda: 3.5)


def save(job: Job) -> None:
    arg_dist.checkpoint.save(job.folder / "step-00000001", job.optimizer, model=job.model)


def load(job: Job) -> Any:
    path = job.folder / "step-00000001"
    restored = arg_dist.checkpoint.load(path, job.optimizer, model=job.model)
    return restored.step, restored.random_states


def save_in_series(job: Job) -> Any:
    series = Checkpoints(job.folder, job.optimizer, model=job.model)
    series.save(1, {"at": [1, 2.5]})
    series.wait()
    return [path.name for path in series.found()]


def load_from_series(job: Job) -> Any:
    restored = Checkpoints(job.folder, job.optimizer, model=job.model).load()
    return restored.step, restored.job


def read_without_an_optimizer(job: Job) -> Any:
    found, index, _ = newest_intact(job.folder)
    with SliceReader(found, index) as reader:
        return [whole_weight(reader, name) for name in sorted(index.weights)]


def stats(job: Job) -> Any:
    own = job.optimizer
    return own.stats(), own.state_bytes(), own.comm_bytes(), own.collectives(), own.held_elements()


ENTRY_POINTS: dict[str, tuple[Action, Action, dict[str, Any]]] = {
    "build": (untrained, Job.build, {}),
    "classify": (untrained, lambda job: arg_dist.classify(job.model), {}),
    "bind": (untrained, lambda job: len(job.optimizer.bind()), {}),
    "first step": (untrained, step, {}),
    "step": (trained, step, {}),
    "step that keeps the bases": (trained_twice, step, {}),
    "step, residual scaled": (trained, step, {"residual": "scaled", "transport": "ldadam"}),
    "step as published": (trained, step, {"preset": "paper", "first_gap": 1, "weight_decay": 0.1}),
    "step in bf16": (trained, step, {"matmul_precision": "medium", "transport": "none"}),
    "step within a budget": (trained, step, {"state_budget": "16KiB"}),
    "step with a closure": (trained, step_with_closure, {}),
    "state_dict": (trained, lambda job: job.optimizer.state_dict(), {}),
    "load_state_dict": (saved, lambda job: job.optimizer.load_state_dict(job.given), {}),
    "consolidate_state_dict": (trained, lambda job: job.optimizer.consolidate_state_dict(), {}),
    "stats": (trained, stats, {}),
    "sample_optimizer": (trained, lambda job: vars(sample_optimizer(job.optimizer)), {}),
    "save": (trained, save, {}),
    "load": (saved, load, {}),
    "series: save": (trained, save_in_series, {}),
    "series: load": (saved, load_from_series, {}),
    "read alone": (saved, read_without_an_optimizer, {}),
}


WRITING = (save, save_in_series)
RANDOM_STATES_LOADED = {("load", "another seed"), ("series: load", "another seed")}


def outcome(entry: str, *modes: str, compiled: bool = False) -> list[Any]:
    """What the entry point returns and leaves, and what another step without modes leave."""
    prepare, action, settings = ENTRY_POINTS[entry]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), **settings)
        prepare(job)
        call = torch.compile(action, backend="eager") if compiled else action
        with ambient_modes.on(*modes):
            result = call(job)
        found = [*leaves(result), *leaves(job.found())]
        if action in WRITING:
            start_anew(job)
            Checkpoints(job.folder, job.optimizer, model=job.model).load()
            found += leaves(job.found())
        job.train(1)
        return [*found, *leaves(job.found())]


def leaves(value: Any) -> Iterator[Any]:
    """Tensors, with what tells them apart beside their values, and plain values."""
    if isinstance(value, Tensor):
        assert value.device.type == "cpu" and not value.is_inference()
        yield str(value.dtype), value.stride(), value.detach().clone()
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key if isinstance(key, (str, int)) else ""
            yield from leaves(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from leaves(inner)
    elif value is not None:
        yield value


@cache
def expected(entry: str) -> list[Any]:
    return outcome(entry)


def check(found: list[Any], entry: str, *, is_exact: bool = True) -> None:
    for ours, plain in zip(found, expected(entry), strict=True):
        if isinstance(plain, tuple) and isinstance(plain[-1], Tensor):
            assert ours[:-1] == plain[:-1], entry
            if is_exact:
                assert torch.equal(ours[-1], plain[-1]), entry
            else:
                ROUNDING.check(ours[-1], plain[-1])
        else:
            assert ours == plain, entry


@pytest.mark.parametrize("mode", ambient_modes.MODES)
def test_a_call_in_a_mode_is_the_call_without_it(mode):
    for entry in ENTRY_POINTS:
        if (entry, mode) not in RANDOM_STATES_LOADED:
            # torch may add up a product in another order with more threads
            check(outcome(entry, mode), entry, is_exact=mode != "two threads")


@pytest.mark.parametrize(
    "modes",
    [
        ("default device", "inference mode", "autocast to bf16", "default dtype fp64"),
        ("warnings are errors", "deterministic", "precision medium", "no_grad"),
    ],
)
def test_modes_may_come_together(modes):
    for entry in ENTRY_POINTS:
        check(outcome(entry, *modes), entry)


@pytest.fixture
def dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tracer of torch.compile, which the environment may have switched off."""
    import torch._dynamo

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(disable=False):
        yield
    assert torch._dynamo.utils.counters["frames"]["total"] > 0
    torch._dynamo.reset()


@pytest.mark.skipif(not QUIET_COMPILER, reason="torch 2.7's compiler changes the surroundings")
@pytest.mark.parametrize("entry", ENTRY_POINTS)
@pytest.mark.filterwarnings("ignore")
def test_a_call_in_a_compiled_function_is_the_call_in_a_plain_one(dynamo, entry):
    check(outcome(entry, compiled=True), entry)


def test_a_closure_runs_in_the_modes_of_the_caller():
    seen = []

    def closure() -> float:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        seen.append(torch.get_default_device().type)
        return 1.0

    weight = nn.Parameter(gaussian(8, 8))
    weight.grad = gaussian(8, 8, seed=1)
    optimizer = AdaRankGrad([weight])
    with ambient_modes.on("autocast to bf16", "default device", "no_grad"):
        optimizer.step(closure)
    assert seen == [(True, True), "meta"]


@pytest.mark.parametrize("low_rank", [True, False])
def test_weights_made_in_inference_mode_are_refused_by_name(low_rank):
    with torch.inference_mode():
        weight = nn.Parameter(gaussian(8, 8))
        weight.grad = gaussian(8, 8)
    optimizer = AdaRankGrad([{"params": [("head", weight)], "low_rank": low_rank}])
    for mode in ("inference mode", "no_grad"):
        with ambient_modes.on(mode), pytest.raises(ConfigError, match=r"head: .*inference_mode"):
            optimizer.step()


def test_weights_without_values_are_refused_by_name():
    weight = nn.Parameter(gaussian(8, 8).to("meta"))
    weight.grad = torch.empty_like(weight)
    with pytest.raises(ConfigError, match=r"head: is on the meta device.*to_empty"):
        AdaRankGrad([("head", weight)]).step()


def test_frozen_weights_made_in_inference_mode_are_saved_and_loaded(tmp_path):
    job = Job(tmp_path)
    with torch.inference_mode():
        job.model.frozen.weight = nn.Parameter(gaussian(4, 4), requires_grad=False)
    expected = job.model.frozen.weight.clone()
    trained(job)
    save(job)
    with torch.inference_mode():
        job.model.frozen.weight.zero_()
    load(job)
    assert torch.equal(job.model.frozen.weight, expected)


def test_autocast_of_an_accelerator_is_switched_off_too(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    torch.set_autocast_enabled("cuda", True)
    try:
        with plain_mode():
            assert not torch.is_autocast_enabled("cuda")
        assert torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_the_capture_of_a_graph_is_refused(monkeypatch, tmp_path):
    job = Job(tmp_path)
    untrained(job)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"step: cannot be captured in a CUDA graph.*replay"):
        job.optimizer.step()


PUBLIC = [AdaRankGrad, Checkpoints]
CALLED_IN_THE_MODES_OF_THE_CALLER = {
    *("initialize", "prepare", "for_trainer"),  # engines build and run the model in them
    "step",  # its closure runs the model
}


INTERNAL = {"every_plan", "state_of"}


def entry_points() -> list[Any]:
    functions = [getattr(arg_dist, name) for name in arg_dist.__all__]
    functions += [arg_dist.checkpoint.save, arg_dist.checkpoint.load, sample_optimizer]
    for kind in PUBLIC:
        for part in kind.__mro__:
            if part.__module__.startswith("arg_dist"):
                functions += [each for name, each in vars(part).items() if name[0] != "_"]
                functions += [vars(part)["__init__"]] if "__init__" in vars(part) else []
    return [pytest.param(each, id=each.__qualname__) for each in functions if isfunction(each)]


@pytest.mark.parametrize("function", entry_points())
def test_every_public_function_is_an_entry_point(function):
    own = function.__name__ in CALLED_IN_THE_MODES_OF_THE_CALLER or function.__name__ in INTERNAL
    assert own or is_entry_point(function), (
        f"{function.__qualname__}: decorate it with arg_dist.sharding.entry.entry_point"
    )
