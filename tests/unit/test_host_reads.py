"""How often a step waits for the device: each read of a tensor's value by Python is such a wait."""

from __future__ import annotations

import pytest
import torch
from matrices import gaussian
from one_process import feed, optimizer_of

from arg_dist.subspace import norms

READS = ("tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The reads so far, by what read."""
    seen: list[str] = []

    def counted(name: str) -> None:
        original = getattr(torch.Tensor, name)

        def read(self: torch.Tensor, *args: object) -> object:
            seen.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, read)

    for name in READS:
        counted(name)
    monkeypatch.setattr(norms, "in_host_memory", lambda part: False)  # as on a GPU
    return seen


@pytest.mark.parametrize("residual", ["orthogonalized", "matched", "scaled", "none"])
@pytest.mark.parametrize("count", [1, 5])
def test_a_step_without_a_refresh_reads_once_whatever_it_is_given(reads, count, residual):
    shapes = [(12, 8), (8, 12), (7,), (3, 8, 6)]
    weights = [gaussian(*shape) for shape in shapes for _ in range(count)]
    optimizer = optimizer_of(*weights, residual=residual, min_gap=9, max_gap=9, refresh_below=0.5)
    for step in range(3):
        gradients = [gaussian(*weight.shape, seed=step) for weight in weights]
        reads.clear()
        feed(optimizer, *gradients)
        if step:
            # squared norms of all gradients: nothing changes before all are known to be finite
            assert reads == ["tolist", "tolist"]


def test_a_refresh_reads_its_energies_once_for_each_matrix(reads):
    optimizer = optimizer_of(gaussian(12, 8), gaussian(8, 12), state_budget="1MiB")
    reads.clear()
    feed(optimizer, gaussian(12, 8, seed=1), gaussian(8, 12, seed=2))
    # what comes after `cpu` reads host memory: spectrum, rank and energy
    assert reads == ["tolist", "tolist"] + 2 * ["cpu", "tolist", "tolist", "__float__"]
