"""Complex, fp64 and strided parameters of several processes: as one process trains them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from matrices import gaussian
from one_process import parameters_of
from tolerances import REDUCTION_ORDER_WEIGHTS
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import arg_dist
from arg_dist import AdaRankGrad, ConfigError
from arg_dist.checkpoint import load, save

SETTINGS = {"lr": 1e-2, "max_rank": 3, "min_rank": 1, "min_gap": 2, "max_gap": 3}


class Spectrum(nn.Module):
    """Complex weights of one, two and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(9, dtype=torch.cfloat))
        self.mix = nn.Parameter(torch.randn(9, 7, dtype=torch.cfloat) / 3)
        self.heads = nn.Parameter(torch.randn(5, 7, 3, dtype=torch.cfloat) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft(x) * self.filter
        return torch.einsum("bf,fm,hmo->bho", spectrum, self.mix, self.heads).abs()


class Spectral(nn.Module):
    """Real weights, then complex ones."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(16, 16)
        self.spectrum = Spectrum()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.spectrum(self.lift(x))


def model_of(group: dist.ProcessGroup | None, engine: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = Spectral()
    if engine == "DDP":
        model = DistributedDataParallel(model, process_group=group)
    elif engine == "FSDP2":
        assert group is not None
        mesh = DeviceMesh.from_group(group, "cpu")
        fully_shard(model.spectrum, mesh=mesh)  # types may differ between units only
        fully_shard(model, mesh=mesh)
    return model


def optimizer_of(model: nn.Module, group: dist.ProcessGroup | None, named: bool) -> AdaRankGrad:
    given: Any = model.named_parameters() if named else arg_dist.param_groups(model)
    return AdaRankGrad(given, process_group=group, **SETTINGS)


def train(model: nn.Module, optimizer: AdaRankGrad, steps: range, share: slice) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(gaussian(12, 16, seed=step)[share]).square().mean().backward()
        optimizer.step()


def whole_weights(optimizer: AdaRankGrad) -> list[torch.Tensor]:
    weights = [parameter.detach() for parameter in parameters_of(optimizer)]
    return [each.full_tensor() if hasattr(each, "full_tensor") else each for each in weights]


def share_of(group: dist.ProcessGroup | None) -> slice:
    if group is None:
        return slice(0, 12)
    count = 12 // dist.get_world_size(group)
    return slice(dist.get_rank(group) * count, (dist.get_rank(group) + 1) * count)


def spectral(
    group: dist.ProcessGroup | None, engine: str, named: bool, folder: Path | None = None
) -> list[torch.Tensor]:
    """Weights after eight steps; with a folder, saved and resumed after four of them."""
    model = model_of(group, engine)
    optimizer = optimizer_of(model, group, named)
    train(model, optimizer, range(4), share_of(group))
    if folder is not None:
        save(folder, optimizer, model=model)
        model = model_of(group, engine)
        optimizer = optimizer_of(model, group, named)
        load(folder, optimizer, model=model)
    train(model, optimizer, range(4, 8), share_of(group))
    return whole_weights(optimizer)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_complex_weights_are_trained_as_by_one_process(pool, processes, engine, named):
    alone = spectral(None, "", named)
    for weights in pool.run(spectral, processes, engine, named):
        for ours, expected in zip(weights, alone, strict=True):
            assert ours.dtype == expected.dtype
            REDUCTION_ORDER_WEIGHTS.check(ours, expected)


@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
def test_a_run_with_complex_weights_is_resumed_to_the_bit(pool, tmp_path, engine):
    straight = pool.run(spectral, 2, engine, False)
    resumed = pool.run(spectral, 2, engine, False, tmp_path / "checkpoint")
    for ours, expected in zip(resumed[0], straight[0], strict=True):
        assert torch.equal(ours, expected)


def go_on(group: dist.ProcessGroup | None, engine: str, folder: Path) -> list[torch.Tensor]:
    model = model_of(group, engine)
    optimizer = optimizer_of(model, group, False)
    load(folder, optimizer, model=model)
    train(model, optimizer, range(4, 8), share_of(group))
    return whole_weights(optimizer)


def stop(group: dist.ProcessGroup | None, engine: str, folder: Path) -> None:
    model = model_of(group, engine)
    optimizer = optimizer_of(model, group, False)
    train(model, optimizer, range(4), share_of(group))
    save(folder, optimizer, model=model)


@pytest.mark.parametrize(("first", "then"), [("DDP", "FSDP2"), ("FSDP2", "DDP")])
def test_a_run_with_complex_weights_moves_to_another_engine(pool, tmp_path, first, then):
    alone = spectral(None, "", False)
    pool.run(stop, 3, first, tmp_path / "checkpoint")
    for ours, expected in zip(
        pool.run(go_on, 2, then, tmp_path / "checkpoint")[0], alone, strict=True
    ):
        REDUCTION_ORDER_WEIGHTS.check(ours, expected)


def complex_columns(group: dist.ProcessGroup) -> str:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = DeviceMesh.from_group(group, "cpu")
    mix = distribute_tensor(torch.randn(9, 8, dtype=torch.cfloat), mesh, [Shard(1)])
    optimizer = AdaRankGrad([("mix", nn.Parameter(mix))], **SETTINGS)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def test_complex_columns_are_refused_by_name(pool):
    for told in pool.run(complex_columns, 2):
        assert "mix: a complex parameter sharded by columns" in told


# -- strides and fp64 ------------------------------------------------------------------------------

SHAPES = [(24, 16), (16, 24), (3, 12, 10), (8, 4, 3, 3), (11,), (), (0, 5)]


def strided(tensor: torch.Tensor, how: str) -> torch.Tensor:
    if how == "channels_last" and tensor.ndim == 4:
        return tensor.to(memory_format=torch.channels_last)
    if how == "transposed":
        order = tuple(reversed(range(tensor.ndim)))
        return tensor.permute(order).contiguous().permute(order)
    return tensor


def together(group: Any, how: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], Any]:
    """Weights after eight steps, and what the first process saved."""
    named = [
        (f"w{i}", nn.Parameter(strided(gaussian(*shape, seed=i).to(dtype), how)))
        for i, shape in enumerate(SHAPES)
    ]
    optimizer = AdaRankGrad(named, process_group=group, **SETTINGS)
    for step in range(8):
        for i, (_, weight) in enumerate(named):
            gradient = gaussian(*SHAPES[i], seed=100 + 10 * step + i).to(dtype)
            weight.grad = strided(gradient, how)
        optimizer.step()
    optimizer.consolidate_state_dict()
    return [weight.detach() for _, weight in named], optimizer.state_dict()


@pytest.mark.parametrize("how", ["contiguous", "transposed", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strides_and_fp64_change_nothing_between_processes(pool, dtype, how):
    alone, _ = together(None, "contiguous", dtype)
    results = pool.run(together, 3, how, dtype)
    for weights, _ in results:
        for ours, first, expected in zip(weights, results[0][0], alone, strict=True):
            assert torch.equal(ours, first) and ours.dtype == dtype
            REDUCTION_ORDER_WEIGHTS.check(ours, expected)
    [vector] = results[0][1]["state"][4].values()
    assert vector["exp_avg"].shape == (11,) and vector["exp_avg"].dtype == dtype


# -- wrappers --------------------------------------------------------------------------------------


def wrapped(group: dist.ProcessGroup) -> str:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 8))
    try:
        ZeroRedundancyOptimizer(model.parameters(), AdaRankGrad, process_group=group, lr=1e-2)
    except ConfigError as error:
        AdaRankGrad(model.parameters())  # without it, nothing is refused
        return str(error)
    return ""


def test_zero_redundancy_optimizer_is_refused_when_it_is_built(pool):
    for told in pool.run(wrapped, 2):
        assert told.startswith("ZeroRedundancyOptimizer: ") and "param_groups(model)" in told


def dealt_out(group: dist.ProcessGroup) -> str:
    """Each process gives the optimizer a parameter of its own."""
    weight = nn.Parameter(gaussian(8, 6 + dist.get_rank(group)))
    weight.grad = torch.ones_like(weight)
    try:
        AdaRankGrad([weight], process_group=group, max_rank=2, min_rank=1).step()
    except RuntimeError as error:
        return str(error)
    return ""


def test_parameters_that_were_dealt_out_are_an_error_that_says_what_differs(pool):
    for told in pool.run(dealt_out, 2, seconds=10):
        assert "different parameters of group 0: process 0 of the group has" in told
        assert "process_group=None" in told
