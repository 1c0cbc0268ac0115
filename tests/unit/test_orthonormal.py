"""Orthonormal columns of sketches of any rank, as a CPU and as a GPU finds them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from matrices import gaussian, whole_numbers, with_spectrum
from tolerances import CHOLESKY_QR, ORTHONORMAL

from arg_dist.subspace import orthonormal
from arg_dist.subspace.orthonormal import cholesky_qr, orthonormalize

TALL = st.tuples(st.integers(1, 40), st.integers(1, 40)).map(lambda s: (max(s), min(s)))
KINDS = {
    "full rank": lambda m, n: gaussian(m, n),
    "half the rank": lambda m, n: gaussian(m, n // 2) @ gaussian(n // 2, n),
    "whole numbers of rank one": lambda m, n: whole_numbers(m, 1) @ whole_numbers(1, n),
    "equal columns": lambda m, n: gaussian(m, 1).expand(m, n),
    "ones": lambda m, n: torch.ones(m, n),
    "zero columns": lambda m, n: gaussian(m, n) * (torch.arange(n) % 2),
    "zero rows": lambda m, n: gaussian(m, n) * (torch.arange(m) % 2)[:, None],
    "zero": lambda m, n: torch.zeros(m, n),
    "one entry": lambda m, n: torch.eye(m, n) * (torch.arange(n) == n // 2),
    "identity": lambda m, n: torch.eye(m, n),
    "tiny singular values": lambda m, n: with_spectrum(m, n, torch.logspace(0, -20, n)),
    "columns of all sizes": lambda m, n: gaussian(m, n) * torch.logspace(-25, 18, n),
}
SCALES = st.sampled_from([1.0, 1e-38, 1e-44, 1e-20, 1e18])


def sketches(kind: str, shape: tuple[int, int], scale: float) -> torch.Tensor:
    return KINDS[kind](*shape) * scale


@given(st.sampled_from(list(KINDS)), TALL, SCALES)
@example("zero", (40, 40), 1.0)
@example("tiny singular values", (40, 40), 1.0)
@example("half the rank", (264, 264), 1.0)
@example("zero columns", (600, 264), 1.0)
@example("ones", (2000, 40), 1.0)
def test_cholesky_qr_is_orthonormal_and_spans_any_sketch(kind, shape, scale):
    sketch = sketches(kind, shape, scale)
    vectors = cholesky_qr(sketch)
    assert vectors.shape == sketch.shape and vectors.dtype == sketch.dtype
    vectors, sketch = vectors.double(), sketch.double()
    CHOLESKY_QR.check(vectors.T @ vectors, torch.eye(shape[1]))
    # Y = Q Q^T Y, relative to the size of Y
    sketch /= sketch.norm().clamp_min(1e-300)
    CHOLESKY_QR.check(vectors @ (vectors.T @ sketch), sketch)


@given(st.sampled_from(list(KINDS)), TALL, st.sampled_from([1.0, 1e-10, 1e10]))
def test_householder_spans_the_same(kind, shape, scale):
    sketch = sketches(kind, shape, scale)
    vectors = orthonormalize(sketch)
    ORTHONORMAL.check(vectors.T @ vectors, torch.eye(shape[1]))
    sketch, other = sketch.double(), cholesky_qr(sketch).double()
    sketch /= sketch.norm().clamp_min(1e-300)
    shared = vectors.double() @ (vectors.double().T @ sketch)
    ORTHONORMAL.check(other @ (other.T @ shared), shared)


@given(TALL)
def test_both_span_one_space_of_a_sketch_of_full_rank(shape):
    sketch = with_spectrum(*shape, torch.linspace(1, 0.2, shape[1]))
    one, other = orthonormalize(sketch), cholesky_qr(sketch)
    ORTHONORMAL.check(one @ (one.T @ other), other)
    ORTHONORMAL.check(other @ (other.T @ one), one)


def test_what_is_added_is_below_the_rounding_of_a_sketch():
    sketch = gaussian(200, 30)
    exact = torch.linalg.qr(sketch.double()).Q
    vectors = cholesky_qr(sketch).double()
    CHOLESKY_QR.check(exact @ (exact.T @ vectors), vectors)


@pytest.mark.parametrize("in_host_memory", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_sketch_that_is_not_finite_gives_no_finite_columns(monkeypatch, in_host_memory, value):
    monkeypatch.setattr(orthonormal, "in_host_memory", lambda part: in_host_memory)
    sketch = gaussian(9, 4)
    sketch[3, 2] = value
    assert not orthonormalize(sketch).isfinite().all()


@pytest.mark.parametrize("in_host_memory", [True, False])
def test_a_process_without_rows_has_none(monkeypatch, in_host_memory):
    monkeypatch.setattr(orthonormal, "in_host_memory", lambda part: in_host_memory)
    assert orthonormalize(torch.empty(0, 4)).shape == (0, 4)
