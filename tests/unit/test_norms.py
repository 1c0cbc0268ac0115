"""Norms of gradients of any size, layout and type, as a CPU and as a GPU computes them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import gaussian
from tolerances import ROUNDING
from torch.utils._python_dispatch import TorchDispatchMode

from arg_dist.subspace import norms
from arg_dist.subspace.norms import DEVICE_RUN, norm_sq, row_squares

TYPES = [torch.float32, torch.bfloat16, torch.float64]
LAYOUTS = {
    "rows": lambda matrix: matrix,
    "columns": lambda matrix: matrix.T.contiguous().T,
    "some columns": lambda matrix: torch.cat([matrix, matrix], 1)[:, : matrix.shape[1]],
    "every other row": lambda matrix: matrix.repeat_interleave(2, 0)[::2],
    "one row": lambda matrix: matrix[:1].expand(matrix.shape),
    "vector": lambda matrix: matrix.reshape(-1),
    "every other element": lambda matrix: matrix.reshape(-1).repeat_interleave(2)[::2],
}


@pytest.fixture(params=[True, False], ids=["host", "device"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In host memory, or as on a GPU."""
    monkeypatch.setattr(norms, "in_host_memory", lambda part: request.param)
    monkeypatch.setattr(norms, "DEVICE_RUN", 50)


SIZES = st.tuples(st.integers(0, 20), st.integers(1, 20))
SCALES = st.sampled_from([1.0, 1e-25, 1e-38, 1e-15, 1e18, 1e30])


@pytest.mark.usefixtures("place")
@given(SIZES, SCALES, st.sampled_from(TYPES), st.sampled_from(list(LAYOUTS)))
def test_the_norm_is_right_whatever_the_size_of_the_gradient(shape, scale, dtype, layout):
    part = LAYOUTS[layout]((gaussian(*shape) * scale).to(dtype))
    expected = math.fsum((part.double() / scale).square().reshape(-1).tolist())
    found = norm_sq(part)
    assert found.dtype == torch.float64 and found.shape == ()
    ROUNDING.check(found / scale / scale, expected)
    if part.ndim == 2:
        ROUNDING.check(norm_sq(part, row_squares(part)) / scale / scale, expected)


@pytest.mark.usefixtures("place")
@given(SIZES, st.sampled_from(TYPES[:2]), st.sampled_from(["rows", "columns", "some columns"]))
def test_squares_of_rows(shape, dtype, layout):
    part = LAYOUTS[layout](gaussian(*shape).to(dtype))
    squares = row_squares(part)
    assert squares.dtype == torch.float32
    ROUNDING.check(squares, part.double().square().sum(1))


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_has_no_finite_norm(value, layout):
    matrix = gaussian(7, 5)
    matrix[0, 3] = value
    part = LAYOUTS[layout](matrix)
    assert not norm_sq(part).isfinite()
    if part.ndim == 2:
        assert not norm_sq(part, row_squares(part)).isfinite()


class Doubles(TorchDispatchMode):
    """The largest fp64 tensor that an operator has returned, in elements; and reads of values."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self.reads = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor) and each.dtype == torch.float64:
                self.most = max(self.most, each.numel())
        return result


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", TYPES[:2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_copy_in_fp64_is_made_on_a_device_and_nothing_read(monkeypatch, layout, dtype, device):
    monkeypatch.setattr(norms, "in_host_memory", lambda part: False)
    monkeypatch.setattr(norms, "DEVICE_RUN", DEVICE_RUN // 64)
    part = LAYOUTS[layout](torch.zeros(1024, 96, dtype=dtype, device=device))
    with Doubles() as doubles:
        squares = row_squares(part) if part.ndim == 2 else None
        total = norm_sq(part, squares)
    assert total.device.type == device
    assert doubles.most <= 8 and doubles.reads == 0
