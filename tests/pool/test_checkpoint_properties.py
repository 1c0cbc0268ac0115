"""Whatever is saved under one way to cut a model comes back under any other, to the bit."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from matrices import gaussian
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import arg_dist
from arg_dist.sharding.shard import MatrixShard
from arg_dist.state_dict import kept_parts
from tests.launch.torch_engines import by_columns, fsdp2
from tests.tolerances import FP64, REDUCTION_ORDER

MORE_STEPS = 2
Sections = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Way:
    """How a model is cut: under which engine, over how many processes, with whole bases or not."""

    engine: str
    processes: int
    shard_basis: bool


@dataclass(frozen=True)
class Case:
    """A model and its training.

    Attributes:
        shapes: of the parameters.
        full_rank: of them, those left to Adam by a group of their own.
        idle: the one that never has a gradient.
        settings: of the optimizer.
        steps: before it is saved.
    """

    shapes: tuple[tuple[int, ...], ...]
    full_rank: frozenset[int]
    idle: int | None
    settings: dict[str, Any]
    steps: int


class Model(nn.Module):
    """Parameters with gradients of their own, and what no optimizer trains."""

    def __init__(self, shapes: tuple[tuple[int, ...], ...], seed: int) -> None:
        super().__init__()
        values = [gaussian(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
        self.trained = nn.ParameterList(values)
        self.frozen = nn.Parameter(gaussian(5, 3, seed=seed), requires_grad=False)
        self.register_buffer("seen", torch.tensor(seed))
        self.register_buffer("scratch", torch.tensor(seed), persistent=False)


class Job:
    """The model under an engine, on one process of several."""

    def __init__(self, group: dist.ProcessGroup, case: Case, way: Way, seed: int, **more: Any):
        model = Model(case.shapes, seed)
        if way.engine == "columns":
            fsdp2(shard_placement_fn=by_columns)(model, group)
        elif way.engine == "rows":
            fsdp2()(model, group)
        self.model, self.idle = model, case.idle
        groups = []
        for low_rank in (True, False):
            chosen = [i for i in range(len(case.shapes)) if (i not in case.full_rank) == low_rank]
            if chosen:
                params = [model.trained[i] for i in chosen]
                names = [f"trained.{i}" for i in chosen]
                groups.append({"params": params, "param_names": names, "low_rank": low_rank})
        self.optimizer = arg_dist.AdaRankGrad(
            groups, process_group=group, shard_basis=way.shard_basis, **more
        )

    def train(self, first: int, last: int) -> list[float]:
        """Steps towards zero; mean squares of all parameters after each."""
        measured = []
        for step in range(first, last):
            for i, parameter in enumerate(self.model.trained):
                gradient = whole(parameter) + 0.3 * gaussian(*parameter.shape, seed=97 * step + i)
                if i != self.idle:
                    parameter.grad = cut_like(parameter, gradient)
            self.optimizer.step()
            measured += [float(whole(each).square().mean()) for each in self.model.trained]
        return measured

    def contents(self) -> Sections:
        """Weights and settings; and this process's rows of the state, with where they belong."""
        weights = {name: whole(value).clone() for name, value in self.model.state_dict().items()}
        settings = {
            name: {key: group[key] for key in group if key not in ("params", "param_names")}
            for group in self.optimizer.param_groups
            for name in group["param_names"]
        }
        parts = {}
        for plan in self.optimizer.bind():
            for shard in plan.shards:
                state = self.optimizer.state_of(shard)
                if state:
                    rows = {
                        key: (places[shard.me], part.clone())
                        for key, (part, places) in kept_parts(shard, state).items()
                    }
                    kind = shard.side_name if isinstance(shard, MatrixShard) else "tensor"
                    turned = shard.fragment.shape if shard.fragment.transposed else None
                    parts[shard.name] = (kind, turned, rows, dict(state))
        return {"weights": weights, "settings": settings, "parts": parts}


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def cut_like(parameter: Tensor, value: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def write(group: dist.ProcessGroup, case: Case, way: Way, folder: Path) -> tuple[Sections, Any]:
    job = Job(group, case, way, 1, **case.settings)
    job.train(0, case.steps)
    arg_dist.checkpoint.save(folder, job.optimizer, model=job.model, step=case.steps)
    return job.contents(), job.train(case.steps, case.steps + MORE_STEPS)


def read(group: dist.ProcessGroup, case: Case, way: Way, folder: Path) -> tuple[Sections, Any]:
    """Goes on from what was saved, with a model of other weights and an optimizer by defaults."""
    job = Job(group, case, way, 1000)
    with warnings.catch_warnings(action="ignore"):  # that settings come from the checkpoint
        restored = arg_dist.checkpoint.load(folder, job.optimizer, model=job.model)
    assert restored.step == case.steps
    assert job.model.scratch == 1000
    return job.contents(), job.train(case.steps, case.steps + MORE_STEPS)


def put_together(everyone: list[Sections]) -> dict[str, dict[str, Any]]:
    """The whole state by name, in the model's order, from what the processes hold of it."""
    found: dict[str, dict[str, Any]] = {}
    for name in sorted({name for sections in everyone for name in sections["parts"]}):
        parts = [each["parts"][name] for each in everyone if name in each["parts"]]
        kind, turned, rows, state = parts[0]
        entry = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        for other in parts:
            assert other[0] == kind
            assert entry.items() <= other[3].items()
        for key in rows:
            pieces = sorted((each[2][key] for each in parts), key=lambda piece: piece[0])
            assert [place[0] for place, _ in pieces[1:]] == [place[1] for place, _ in pieces[:-1]]
            values = torch.cat([piece for _, piece in pieces])
            if kind == "tensor" and turned is not None:
                values = values.view(turned).T.reshape(-1)
            entry[key] = values
        if "kept_sq" in state:
            entry["kept_sq"] = sum(float(each[3]["kept_sq"]) for each in parts)
        found[name] = {"kind": kind, **entry}
    return found


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    """Where two dictionaries of tensors and plain values are not the same to the bit."""
    for key in ours.keys() | theirs.keys():
        mine, other = ours.get(key), theirs.get(key)
        same = type(mine) is type(other)
        if same and isinstance(mine, Tensor):
            same = mine.dtype == other.dtype and torch.equal(mine, other)
        elif same:
            same = mine == other
        if not same:
            yield key


lengths = st.integers(1, 16) | st.sampled_from([12, 24])
shapes = (
    st.tuples(lengths, lengths)
    | st.tuples(lengths)
    | st.tuples(st.integers(1, 5), lengths, lengths)
    | st.tuples(lengths, st.just(24))
)
ways = st.builds(
    Way,
    engine=st.sampled_from(["DDP", "rows", "columns"]),
    processes=st.integers(1, 4),
    shard_basis=st.booleans(),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    chosen = tuple(draw(st.lists(shapes, min_size=1, max_size=5)))
    positions = st.integers(0, len(chosen) - 1)
    gap = draw(st.integers(1, 3))
    return Case(
        chosen,
        full_rank=draw(st.frozensets(positions, max_size=2)),
        idle=draw(st.none() | positions),
        settings={
            "lr": 1e-2,
            "side": draw(st.sampled_from(["auto", "left", "right"])),
            "max_rank": draw(st.integers(1, 6) | st.sampled_from([0.2, 0.6])),
            "min_rank": 1,
            "energy": draw(st.sampled_from([0.5, 0.8, 0.99])),
            "min_gap": gap,
            "max_gap": draw(st.integers(gap, 4)),
            "power_passes": draw(st.integers(0, 1)),
            "residual": draw(st.sampled_from(["none", "scaled", "matched", "orthogonalized"])),
            "residual_momentum": draw(st.sampled_from([0.0, 0.9])),
            "state_dtype": draw(st.sampled_from(["fp32", "bf16", "int8"])),
            "transport": draw(st.sampled_from(["squared", "paper", "ldadam", "none"])),
            "view": draw(st.sampled_from(["auto", "flatten"])),
            "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        },
        steps=draw(st.integers(0, 5)),
    )


# no shrinking: a failure ends the pool's processes, and each attempt would start them anew
@settings(max_examples=25, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(cases(), ways, ways)
def test_what_is_saved_comes_back(pool, case, writer, reader):
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "checkpoint"
        saved, went_on = zip(*pool.run(write, writer.processes, case, writer, folder), strict=True)
        found, goes_on = zip(*pool.run(read, reader.processes, case, reader, folder), strict=True)
    kept_as_now = ("low_rank", "shard_basis")
    for process in found:
        for name, value in saved[0]["weights"].items():
            if name != "scratch":
                assert torch.equal(process["weights"][name], value), name
        for name, values in saved[0]["settings"].items():
            different = {*differences(values, process["settings"][name])}
            assert different <= {*kept_as_now}, name
    before, after = put_together(list(saved)), put_together(list(found))
    assert before.keys() == after.keys()
    for name, entry in before.items():
        if "kept_sq" in entry:  # a sum over the processes, put together in another order
            FP64.check(after[name].pop("kept_sq"), entry.pop("kept_sq"))
        assert not [*differences(entry, after[name])], name
    for measured in goes_on:
        REDUCTION_ORDER.check(torch.tensor(measured), torch.tensor(went_on[0]))
        if writer == reader:
            assert measured == went_on[0]
