"""How often a step waits for the device: each read of a tensor's value by Python is such a wait."""

from __future__ import annotations

import pytest
import torch
from matrices import gaussian
from one_process import feed, optimizer_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from arg_dist import AdaRankGradConfig
from arg_dist.algorithm import Choice, StepFacts, low_rank_step, refresh_next
from arg_dist.sharding.drivers import run_local
from arg_dist.subspace import norms, range_finder
from arg_dist.subspace.distributed import single_process
from arg_dist.subspace.norms import norm_sq, row_squares
from tests.installed import IN_PYTHON

pytestmark = pytest.mark.skipif(not IN_PYTHON, reason="torch 2.7 sees each read twice")

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
            assert reads == ["tolist"]


def test_a_refresh_reads_its_energies_once_for_each_matrix(reads):
    optimizer = optimizer_of(gaussian(12, 8), gaussian(8, 12), state_budget="1MiB")
    reads.clear()
    feed(optimizer, gaussian(12, 8, seed=1), gaussian(8, 12, seed=2))
    # what comes after `cpu` reads host memory: spectrum, rank and energy
    assert reads == ["tolist"] + 2 * ["cpu", "tolist", "tolist", "__float__"]


def on_device(tensor: torch.Tensor) -> bool:
    """Of tensors without data, those that stand for a GPU's; the others are in host memory."""
    return tensor.device.type == "meta"


class Waits(TorchDispatchMode):
    """What operators on tensors of a GPU make the host wait for.

    Attributes:
        waits: copies to the host, and operators that read values, by name and shape.
        sent: whether each copy to the GPU lets the host go on.
    """

    READ = ("item", "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
    CHECKED = ("_linalg_check_errors", "_linalg_eigh", "_linalg_svd")
    """Operators that read whether they have failed."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[str, tuple[int, ...]]] = []
        self.sent: list[bool] = []
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        given = [each for each in args if isinstance(each, torch.Tensor)]
        on_gpu = any(on_device(each) for each in given)
        if on_gpu:
            self.names.add(name)
        if on_gpu and name in self.READ + self.CHECKED:
            self.waits.append((name, tuple(given[0].shape)))
        if name == "copy_":
            source, target, blocking = args[1], args[0], not (len(args) > 2 and args[2])
        elif name == "_to_copy":
            source, target, blocking = args[0], result, not kwargs.get("non_blocking")
        else:
            return result
        if on_device(source) and not on_device(target):
            self.waits.append((name, tuple(source.shape)))
        elif on_device(target) and not on_device(source):
            self.sent.append(not blocking)
        return result


@pytest.mark.parametrize("residual", ["orthogonalized", "matched", "scaled", "none"])
@pytest.mark.parametrize("transport", ["squared", "paper", "ldadam", "none"])
def test_a_refresh_on_a_gpu_waits_once_for_the_gram_matrix_alone(monkeypatch, residual, transport):
    monkeypatch.setattr(range_finder, "to_host_memory", torch.Tensor.cpu)
    rank, oversample = 3, 2
    settings = AdaRankGradConfig(
        max_rank=rank, min_rank=1, oversample=oversample, residual=residual, transport=transport
    )
    facts, state = StepFacts("w", norm_sq=1.0, kept_sq=1.0, phase=0.0), {}
    sharding = single_process(24, 16)
    with FakeTensorMode():  # which also raises where tensors of two devices meet
        gradient = torch.empty(24, 16, device="meta")
        for step in range(2):
            with Waits() as seen:
                squares = row_squares(gradient)
                assert on_device(norm_sq(gradient, squares))
                steps = low_rank_step(
                    lambda: gradient,
                    squares,
                    state,
                    sharding,
                    settings,
                    facts,
                    choose=lambda energies, *_: Choice(len(energies[:rank]), 1.0),
                )
                update = run_local(steps)
            assert update is not None and on_device(update.basis) and on_device(update.direction)
            assert seen.waits == [("_to_copy", (rank + oversample,) * 2)], step
            assert seen.sent == [True, True]  # the rotation and the energies
            assert "cumsum" not in seen.names and "linalg_cholesky_ex" in seen.names
            refresh_next(state)
