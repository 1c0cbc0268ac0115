"""The precision of matrix products is the optimizer's own, and leaves the job's alone."""

from __future__ import annotations

from collections.abc import Iterator

import ambient_modes
import pytest
import torch
from matrices import gaussian
from one_process import feed, optimizer_of, parameters_of
from tolerances import BF16_PRODUCTS

from arg_dist.subspace.products import CPU, MatmulPrecision, matmul_precision
from tests.installed import PRECISION_BY_BACKEND

SIZE = 256
"""oneDNN takes products of smaller matrices in fp32 anyway."""


def has_bf16() -> bool:
    left, right = gaussian(SIZE, SIZE), gaussian(SIZE, SIZE, seed=1)
    with matmul_precision("medium"):
        return not torch.equal(left @ right, exactly(left, right))


def exactly(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    with matmul_precision("highest"):
        return left @ right


@pytest.fixture
def job_at(request: pytest.FixtureRequest) -> Iterator[MatmulPrecision]:
    """A job that has chosen a precision for its model's products."""
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


def trained(steps: int = 3, **settings: object) -> torch.Tensor:
    optimizer = optimizer_of(gaussian(SIZE, SIZE), max_rank=64, min_rank=64, **settings)
    for step in range(steps):
        feed(optimizer, gaussian(SIZE, SIZE, seed=10 + step))
    return parameters_of(optimizer)[0].detach()


@pytest.mark.parametrize("job_at", ["high", "medium"], indirect=True)
def test_the_jobs_precision_does_not_reach_a_step_and_is_kept(job_at):
    weights = trained()
    assert torch.get_float32_matmul_precision() == job_at
    if PRECISION_BY_BACKEND:
        assert torch.backends.mkldnn.matmul.fp32_precision == CPU[job_at]
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(weights, trained())


@pytest.mark.parametrize("job_at", ["high", "medium"], indirect=True)
def test_it_is_kept_where_a_step_fails(job_at):
    with pytest.raises(FloatingPointError):
        feed(optimizer_of(gaussian(8, 8)), torch.full((8, 8), torch.nan))
    with pytest.raises(ZeroDivisionError), matmul_precision("highest"):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == job_at


@pytest.mark.skipif(not has_bf16(), reason="this CPU takes products in fp32 alone")
def test_medium_rounds_the_steps_products_and_no_basis():
    exact, rounded = (
        optimizer_of(gaussian(SIZE, SIZE), max_rank=64, matmul_precision=precision)
        for precision in ("highest", "medium")
    )
    for optimizer in (exact, rounded):
        feed(optimizer, gaussian(SIZE, SIZE, seed=1))
    one, other = (next(iter(optimizer.state.values()))["w0"] for optimizer in (exact, rounded))
    assert torch.equal(one["basis"], other["basis"])
    lost = (one["exp_avg"] - other["exp_avg"]).norm() / one["exp_avg"].norm()
    assert lost > 0
    BF16_PRODUCTS.check(lost, 0.0)


CHOSEN = [
    name
    for name in (
        *("no_grad", "precision high", "precision medium", "allow_tf32"),
        *("fp32_precision tf32", "oneDNN in bf16"),
    )
    if name in ambient_modes.MODES
]


@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("precision", CPU)
def test_all_of_torchs_flags_agree_within_whatever_the_job_has_chosen(chosen, precision):
    with ambient_modes.on(chosen), matmul_precision(precision):
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.allow_tf32 == (precision != "highest")


@pytest.mark.skipif(not PRECISION_BY_BACKEND, reason="torch before 2.9")
def test_a_backend_goes_on_inheriting_what_the_job_chooses():
    with ambient_modes.on("fp32_precision tf32"):
        trained(steps=1)
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        torch.backends.fp32_precision = "tf32"
