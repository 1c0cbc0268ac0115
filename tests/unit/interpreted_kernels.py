"""The kernels against the plain path, value for value; `test_kernels.py` runs it by itself.

Triton decides between its interpreter and a GPU when it is imported. ``KERNELS_ON=cuda`` runs the
same on a GPU. Operands are whole numbers, so that all sums are exact in any order; those of a basis
have up to 11 bits, which is what TF32 and two numbers in bf16 hold.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import STEADY, Launched, as_on_a_gpu, gradients_of_step, take
from matrices import gaussian
from one_process import optimizer_of, parameters_of
from tolerances import BF16_PRODUCTS, ROUNDING, TWO_PARTS
from torch import Tensor

from arg_dist import AdaRankGrad
from arg_dist import step as step_of_a_plan
from arg_dist.subspace import grouped_kernels as grouped
from arg_dist.subspace import products

DEVICE = torch.device(os.environ.get("KERNELS_ON", "cpu"))
FP32, BF16 = torch.float32, torch.bfloat16
PRECISIONS = ("highest", "high", "medium")


def numbers(shape: tuple[int, ...], seed: int, largest: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def transposed(matrix: Tensor) -> Tensor:
    return matrix.T.contiguous().T


def in_wider_rows(matrix: Tensor) -> Tensor:
    return torch.cat([matrix, matrix], 1)[:, : matrix.shape[1]]


def at_an_odd_address(matrix: Tensor) -> Tensor:
    return torch.cat([matrix.new_zeros(1), matrix.reshape(-1)])[1:].view(matrix.shape)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    torch.clone,
    transposed,
    in_wider_rows,
    at_an_odd_address,
]


def listed(
    count: int,
    shape: tuple[int, ...],
    dtype: torch.dtype = FP32,
    layout: Callable[[Tensor], Tensor] = torch.clone,
    **options: int,
) -> list[Tensor]:
    """Different matrices for each position; `options` are of :func:`numbers`."""
    seed = options.pop("seed", 0)
    return [
        layout(numbers(shape, 10 * seed + i, **options).to(DEVICE, dtype)) for i in range(count)
    ]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[grouped.Launch]]:
    seen: list[grouped.Launch] = []
    run = grouped.run
    monkeypatch.setattr(grouped, "run", lambda *args: (seen.append(args[0]), run(*args)))
    yield seen


SIZES = {
    "count": st.integers(1, 3),
    "rows": st.sampled_from([1, 16, 63, 64, 70, 130]),
    "columns": st.sampled_from([1, 31, 32, 80]),
    "rank": st.sampled_from([1, 16, 37, 64, 130]),
}


@settings(max_examples=12)
@given(
    **SIZES,
    dtype=st.sampled_from([FP32, BF16]),
    layout=st.sampled_from(LAYOUTS),
    precision=st.sampled_from(PRECISIONS),
    parts=st.sampled_from([None, 1, 2]),
    exact=st.booleans(),
    programs=st.sampled_from([1, 132]),
)
def test_project(count, rows, columns, rank, dtype, layout, precision, parts, exact, programs):
    gradients = listed(count, (rows, columns), dtype, layout)
    bases = listed(count, (columns, rank), FP32, layout, largest=2000, seed=1)
    how = dict(precision=precision, parts=parts, exact=exact)
    exactly = dict(parts=products.bf16_parts(precision, parts))  # on a CPU, medium is bf16
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(grouped, "PROGRAMS", programs)
        found, squares = grouped.project(gradients, bases, **how)
    expected, expected_squares = products.plain_project(gradients, bases, **exactly)
    assert torch.equal(found, expected)
    assert torch.equal(squares, expected_squares)


@settings(max_examples=12)
@given(
    count=SIZES["count"],
    rows=SIZES["rows"],
    columns=SIZES["columns"],
    dtype=st.sampled_from([FP32, BF16]),
    layout=st.sampled_from(LAYOUTS),
)
def test_squares(count, rows, columns, dtype, layout):
    gradients = listed(count, (rows, columns), dtype, layout)
    totals = grouped.squares(gradients)
    for G, total in zip(gradients, totals, strict=True):
        assert torch.equal(total, G.double().square().sum(1))


def test_squares_of_the_smallest_numbers_are_not_zero() -> None:
    (total,) = grouped.squares([listed(1, (3, 40), largest=1)[0] * 1e-30])
    assert 0 < float(total.sum()) < 1e-57


@settings(max_examples=12)
@given(
    **SIZES,
    dtype=st.sampled_from([FP32, BF16]),
    other=st.sampled_from([FP32, BF16]),
    layout=st.sampled_from(LAYOUTS),
    adds=st.sampled_from(["nothing", "residual", "gradient"]),
    precision=st.sampled_from(PRECISIONS),
    exact=st.booleans(),
    programs=st.sampled_from([1, 132]),
)
def test_apply(count, rows, columns, rank, dtype, other, layout, adds, precision, exact, programs):
    weights = listed(count, (rows, columns), dtype, layout, largest=250)
    expected = [layout(each) for each in weights]
    directions = listed(count, (rows, rank), seed=1)
    bases = listed(count, (columns, rank), seed=2)
    added = listed(count, (rows, columns), other, layout, seed=3)
    factors = [each / 4 for each in listed(count, (rows,), seed=4)]
    rows_and_outside = {
        "nothing": (None, None),
        "residual": (None, added),
        "gradient": (factors, added),
    }[adds]
    how = dict(keep=0.75, step=-0.5)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(grouped, "PROGRAMS", programs)
        grouped.apply(
            weights, directions, bases, *rows_and_outside, **how, precision=precision, exact=exact
        )
    products.plain_apply(expected, directions, bases, *rows_and_outside, **how)
    assert all(map(torch.equal, weights, expected))


def test_what_is_around_a_matrix_stays() -> None:
    wide = listed(2, (20, 40))
    before = [each.clone() for each in wide]
    weights = [each[2:17, 3:30] for each in wide]
    grouped.apply(weights, listed(2, (15, 5)), listed(2, (27, 5)), keep=0.5, step=1.0)
    for each, was in zip(wide, before, strict=True):
        assert not torch.equal(each, was)
        each[2:17, 3:30] = was[2:17, 3:30]
        assert torch.equal(each, was)


def test_one_launch_for_a_list(launches: list[grouped.Launch]) -> None:
    gradients, bases = listed(3, (8, 8), BF16), listed(3, (8, 4))
    grouped.project(gradients, bases)
    assert len(launches) == 1
    grouped.apply(listed(3, (8, 8)), listed(3, (8, 4)), bases, keep=1.0, step=1.0)
    assert len(launches) == 2


def test_another_launch_for_each_kind_and_results_in_the_order_of_the_list(
    launches: list[grouped.Launch],
) -> None:
    gradients = listed(5, (16, 16))
    gradients[1] = gradients[1].bfloat16()
    gradients[2] = transposed(gradients[2])
    gradients[3] = at_an_odd_address(gradients[3])
    bases = listed(5, (16, 16), seed=1)
    found, squares = grouped.project(gradients, bases)
    expected, expected_squares = products.plain_project(gradients, bases)
    assert torch.equal(found, expected) and torch.equal(squares, expected_squares)
    assert sorted(len(launch.table) for launch in launches) == [1, 1, 1, 2]


@pytest.mark.parametrize(("rows", "columns", "rank"), [(0, 3, 2), (3, 0, 2), (3, 3, 0)])
def test_what_is_empty(rows: int, columns: int, rank: int) -> None:
    gradients, bases = listed(2, (rows, columns)), listed(2, (columns, rank))
    for actual, expected in zip(
        grouped.project(gradients, bases), products.plain_project(gradients, bases), strict=True
    ):
        assert torch.equal(actual, expected)
    weights, expected_weights = listed(2, (rows, columns)), listed(2, (rows, columns))
    for path, each in ((grouped.apply, weights), (products.plain_apply, expected_weights)):
        path(each, listed(2, (rows, rank)), bases, keep=0.5, step=1.0)
    assert all(map(torch.equal, weights, expected_weights))


def test_without_matrices_nothing_is_launched(launches: list[grouped.Launch]) -> None:
    found, squares = grouped.project([], [])
    assert found.shape == (0, 0, 0) and squares.shape == (0, 0)
    grouped.apply([], [], [], keep=1.0, step=1.0)
    assert not launches


def test_a_missing_gradient_is_zeros_without_strides() -> None:
    gradients = [torch.zeros(1, device=DEVICE).expand(20, 24)]
    found, squares = grouped.project(gradients, listed(1, (24, 5)))
    assert not found.any() and not squares.any()


@pytest.mark.parametrize(("parts", "tolerance"), [(1, BF16_PRODUCTS), (2, TWO_PARTS)])
def test_a_basis_in_parts(parts: int, tolerance) -> None:
    G = gaussian(64, 96).bfloat16().to(DEVICE)
    Q = torch.linalg.qr(gaussian(96, 24, seed=1)).Q.to(DEVICE)
    (product,), _ = grouped.project([G], [Q], parts=parts)
    exact = G.double() @ Q.double()
    tolerance.check(float((product - exact).norm() / exact.norm()), 0.0)


# -- counting -------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter counts")
@pytest.mark.parametrize("programs", [1, 132])
def test_elements_loaded_and_stored(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    m, n, r = 150, 70, 140
    block, rank_blocks = (128 if programs == 1 else 64), 2
    row_blocks, column_blocks = -(-m // block), -(-n // 64)
    G, Q, N, W = (listed(1, shape) for shape in ((m, n), (n, r), (m, r), (m, n)))
    E, phi = listed(1, (m, n)), listed(1, (m,))
    loads, stores = counted(monkeypatch)
    monkeypatch.setattr(grouped, "PROGRAMS", programs)
    # an uneven G in fp32 has 64 columns of the basis at once, so it is in bf16 here
    low = [each.bfloat16() for each in G]
    found, squares = grouped.project(low, Q)
    read = at(loads, G=low[0], Q=Q[0])
    assert read == {"G": rank_blocks * m * n, "Q": row_blocks * n * r}
    assert at(stores, P=found, S=squares) == {"P": m * r, "S": m}
    assert sum(stores.values()) == m * r + m
    loads.clear(), stores.clear()
    grouped.apply(W, N, Q, phi, E, keep=1.0, step=1.0)
    assert at(loads, W=W[0], N=N[0], Q=Q[0], E=E[0], phi=phi[0]) == {
        "W": m * n,
        "N": column_blocks * m * r,
        "Q": row_blocks * n * r,
        "E": m * n,
        "phi": column_blocks * m,
    }
    assert at(stores, W=W[0]) == {"W": m * n} and sum(stores.values()) == m * n


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter counts")
@pytest.mark.parametrize(("residual", "shape"), [("none", (48, 32)), ("matched", (32, 48))])
def test_a_step_starts_two_operators_for_each_of_many_matrices(
    residual: str, shape: tuple[int, int], launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [gaussian(*shape, seed=i) for i in range(24)]
    ours, theirs = (optimizer_of(*weights, **STEADY, residual=residual) for _ in range(2))
    with as_on_a_gpu():
        for step in range(3):
            gradients = gradients_of_step(step, weights)
            take(theirs, gradients)
            launches.clear()
            with monkeypatch.context() as patched, Launched() as seen:
                patched.setattr(products, "available", lambda device: True)
                patched.setattr(step_of_a_plan, "available", lambda device: True)
                take(ours, gradients)
    assert len(launches) == 3  # squares, project, apply
    # each after a copy of its table
    assert seen.operators.total() + 2 * len(launches) <= 2 * len(weights), seen.operators
    for actual, expected in zip(*map(parameters_of, (ours, theirs)), strict=True):
        ROUNDING.check(actual.detach(), expected.detach())


def test_groups_whose_residuals_differ_are_updated_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    for has_kernels in (True, False):
        named = [(f"w{i}", torch.nn.Parameter(gaussian(20, 16, seed=i))) for i in range(6)]
        rules = ("none", "matched", "orthogonalized")
        groups = [
            {"params": named[2 * i : 2 * i + 2], "residual": rule} for i, rule in enumerate(rules)
        ]
        optimizer = AdaRankGrad(groups, **STEADY)
        with monkeypatch.context() as patched, as_on_a_gpu():
            for module in (products, step_of_a_plan):
                patched.setattr(module, "available", lambda device, it=has_kernels: it)
            for step in range(2):
                take(optimizer, gradients_of_step(step, [each for _, each in named]))
        trained.append([each.detach() for _, each in named])
    for actual, expected in zip(*trained, strict=True):
        ROUNDING.check(actual, expected)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter counts")
@pytest.mark.parametrize(("dtype", "most"), [(FP32, 24), (BF16, 16)])
@pytest.mark.parametrize("residual", ["none", "matched"])
def test_bytes_of_a_step_for_each_parameter(
    residual: str, dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, count = 128, 2  # a rank of 4 is a thirty-second of it
    weights = [gaussian(size, size, seed=i).to(dtype) for i in range(count)]
    optimizer = optimizer_of(*weights, **STEADY, residual=residual)
    monkeypatch.setattr(products, "available", lambda device: True)
    monkeypatch.setattr(step_of_a_plan, "available", lambda device: True)
    with as_on_a_gpu():
        take(optimizer, gradients_of_step(0, weights))
        gradients = gradients_of_step(1, weights)
        by_kernels = moved_by_kernels(monkeypatch)
        with Launched() as seen:
            take(optimizer, gradients)
    assert len(by_kernels) == 3  # squares, project, apply
    least = (3 if residual == "none" else 4) * weights[0].element_size()
    parameters = count * size * size
    assert least * parameters < sum(by_kernels) + seen.moved <= most * parameters


def moved_by_kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that each launch moves, where caches serve what is loaded again."""
    from triton.runtime.interpreter import InterpreterBuilder

    loaded: dict[int, int] = {}
    stored: dict[int, int] = {}
    moved: list[int] = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    run = grouped.run

    def note(sizes: dict[int, int], pointers: Any, mask: Any) -> None:
        addresses = pointers.data[mask.data.astype(bool)].tolist()
        bits = pointers.get_element_ty().primitive_bitwidth
        sizes.update(dict.fromkeys(addresses, bits // 8))

    def noting_load(self, pointers, mask, *others):
        note(loaded, pointers, mask)
        return load(self, pointers, mask, *others)

    def noting_store(self, pointers, value, mask, *others):
        note(stored, pointers, mask)
        return store(self, pointers, value, mask, *others)

    def noting_run(launch: grouped.Launch, device: torch.device) -> None:
        loaded.clear(), stored.clear()
        run(launch, device)
        moved.append(sum(loaded.values()) + sum(stored.values()))

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", noting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", noting_store)
    monkeypatch.setattr(grouped, "run", noting_run)
    return moved


def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[int], Counter[int]]:
    """How often each address is loaded and stored."""
    from triton.runtime.interpreter import InterpreterBuilder

    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self, pointers, mask, *others):
        loads.update(pointers.data[mask.data.astype(bool)].tolist())
        return load(self, pointers, mask, *others)

    def counting_store(self, pointers, value, mask, *others):
        stores.update(pointers.data[mask.data.astype(bool)].tolist())
        return store(self, pointers, value, mask, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
    return loads, stores


def at(counts: Counter[int], **operands: Tensor) -> dict[str, int]:
    """Of each operand, the number of times that its elements are counted."""
    return {
        name: sum(
            times
            for address, times in counts.items()
            if operand.data_ptr() <= address < operand.data_ptr() + operand.nbytes
        )
        for name, operand in operands.items()
    }
