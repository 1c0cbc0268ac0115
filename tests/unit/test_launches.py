"""How many operators a steady step starts on a GPU, counted on a CPU; all that it calls is counted.

With the kernels it is in ``interpreted_kernels.py``.
"""

from __future__ import annotations

import pytest
from launched import STEADY, Launched, as_on_a_gpu, gradients_of_step, take
from matrices import gaussian
from one_process import optimizer_of

MATRICES = 24


@pytest.mark.parametrize("residual", ["none", "matched", "orthogonalized"])
@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_operators_for_each_of_many_matrices(residual: str, shape: tuple[int, int]) -> None:
    weights = [gaussian(*shape, seed=i) for i in range(MATRICES)]
    optimizer = optimizer_of(*weights, **STEADY, residual=residual)
    with as_on_a_gpu():
        for step in range(2):
            take(optimizer, gradients_of_step(step, weights))
        gradients = gradients_of_step(2, weights)
        with Launched() as seen:
            take(optimizer, gradients)
    assert seen.operators.total() <= 12 * MATRICES, seen.operators


def test_what_is_counted() -> None:
    first, second = gaussian(3, 4), gaussian(4, 5)
    with Launched() as seen:
        product = first @ second
        product.T.add_(1.0)
        product.new_empty(7)
    assert seen.operators == {"mm": 1, "add_": 1}
    assert seen.moved == 4 * (3 * 4 + 4 * 5 + 3 * 5) + 4 * 2 * 15
