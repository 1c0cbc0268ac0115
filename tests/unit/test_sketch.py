"""Sketch matrices depend on what is sketched, not on who sketches it."""

from __future__ import annotations

import hashlib
import math
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import geometric, with_spectrum
from one_process import one_step
from torch.utils._python_dispatch import TorchDispatchMode

from arg_dist.sharding.drivers import run_local
from arg_dist.subspace.distributed import single_process
from arg_dist.subspace.range_finder import range_finder
from arg_dist.subspace.sketch import hashed, random_signs, uniform

ROWS = 90
WIDTHS = st.integers(1, 100)


def rows(low: int, high: int, columns: int = 40, **changes) -> torch.Tensor:
    return random_signs((low, high), columns, **{"seed": 0, "name": "w", "refresh": 0, **changes})


@given(st.lists(st.integers(0, ROWS), min_size=0, max_size=4), WIDTHS)
def test_any_cut_of_the_rows_is_of_the_same_matrix(cuts, columns):
    bounds = [0, *sorted(cuts), ROWS]
    parts = [rows(low, high, columns) for low, high in pairwise(bounds)]
    assert torch.equal(torch.cat(parts), rows(0, ROWS, columns))


@given(st.integers(0, ROWS), st.integers(0, ROWS), WIDTHS)
def test_a_part_without_rows_has_columns(low, high, columns):
    assert rows(max(low, high), min(low, high), columns).shape == (0, columns)


@given(st.text(max_size=9), st.integers(0, 2**40), st.integers(1, 50))
def test_words_are_those_of_splitmix64(text, first, count):
    modulus = 2**64

    def mixed(k: int) -> int:
        z = (key + k * 0x9E3779B97F4A7C15) % modulus
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % modulus
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % modulus
        return z ^ (z >> 31)

    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    words = [word % modulus for word in hashed(text, (first, first + count)).tolist()]
    assert words == [mixed(k) for k in range(first, first + count)]


@given(st.integers(0, ROWS), WIDTHS)
def test_signs_are_the_highest_bits_of_words(row, columns):
    each = math.ceil(columns / 32)
    words = hashed(f"0|w|0|{columns}", (row * each, (row + 1) * each)).tolist()
    bits = [words[i // 32] >> (63 - i % 32) & 1 for i in range(columns)]
    assert rows(row, row + 1, columns)[0].tolist() == [1.0 - 2.0 * bit for bit in bits]


@pytest.mark.parametrize("changes", [{"seed": 1}, {"name": "v"}, {"refresh": 1}])
def test_another_seed_name_or_refresh_is_another_matrix(changes):
    other, these = rows(0, ROWS, **changes), rows(0, ROWS)
    # as many signs agree as by chance: 4 standard deviations
    assert abs((other * these).mean()) < 4 / math.sqrt(these.numel())


def test_every_refresh_has_a_new_sketch():
    state, bases, gradient = {}, [], torch.eye(9)
    for _ in range(3):
        one_step(gradient, state, max_rank=3, min_gap=1, max_gap=1, oversample=0, power_passes=0)
        bases.append(state["basis"])
    assert not torch.equal(bases[0], bases[1]) and not torch.equal(bases[1], bases[2])


def test_no_random_state_is_read_or_changed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = rows(0, 9)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(rows(0, 9), first)


def test_entries_are_signs_balanced_in_every_row_and_column():
    sketch = rows(0, 4096, 72)
    assert torch.equal(sketch.abs(), torch.ones(4096, 72))
    assert abs(sketch.mean()) < 4 / math.sqrt(sketch.numel())
    # sums of n signs have the variance n; the largest of k sums is below 5 deviations
    assert sketch.sum(0).abs().max() < 5 * math.sqrt(4096)
    assert sketch.sum(1).abs().max() < 5 * math.sqrt(72)
    assert 0.9 < float(sketch.sum(0).square().mean()) / 4096 < 1.3
    assert 0.9 < float(sketch.sum(1).square().mean()) / 72 < 1.1


def test_columns_are_nearly_orthogonal_and_rows_and_columns_independent():
    sketch = rows(0, 4096, 72)
    gram = sketch.T @ sketch / math.sqrt(4096)
    apart = gram[~torch.eye(72, dtype=torch.bool)]
    assert apart.abs().max() < 5
    assert 0.95 < float(apart.square().mean()) < 1.05
    # all singular values within those of random matrices, sqrt(n) -+ sqrt(k) (Marchenko, Pastur)
    singular = torch.linalg.svdvals(sketch)
    assert float(singular.min()) > 64 - 9 and float(singular.max()) < 64 + 9
    # signs of neighbouring rows, and of neighbouring words in a row
    for one, other in ((sketch[1:], sketch[:-1]), (sketch[:, 32:64], sketch[:, :32])):
        assert abs((one * other).mean()) < 4 / math.sqrt(one.numel())


def test_no_pair_of_names_and_refreshes_shares_signs():
    texts = [(name, refresh) for name in ("a", "b", "layers.0.q") for refresh in range(4)]
    matrices = [rows(0, ROWS, name=name, refresh=refresh) for name, refresh in texts]
    for one, other in combinations(matrices, 2):
        assert abs((one * other).mean()) < 5 / math.sqrt(one.numel())


def test_numbers_are_uniform():
    numbers = uniform("w", 10000)
    assert float(numbers.min()) >= -1 and float(numbers.max()) < 1
    assert abs(float(numbers.mean())) < 0.02
    counts = torch.histc(numbers, bins=20, min=-1, max=1)
    assert float(((counts - 500).square() / 500).sum()) < 40  # chi-square of 19 degrees: 0.3 %


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() > self.bytes:
            self.bytes = result.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("columns", [4, 32, 33, 264])
def test_nothing_larger_than_the_result_is_made_on_any_device(device, columns):
    with Largest() as largest:
        sketch = rows(0, 200, columns, device=torch.device(device))
    assert sketch.device.type == device and sketch.shape == (200, columns)
    assert largest.bytes <= sketch.nbytes


@pytest.mark.parametrize("passes", [0, 1])
@pytest.mark.parametrize("spectrum", [geometric(96, 0.9), 1 / torch.arange(1, 97).sqrt()])
def test_signs_find_as_much_energy_as_gaussians(spectrum, passes):
    gradient = with_spectrum(160, 96, spectrum)
    sharding = single_process(*gradient.shape)

    def kept(omega: torch.Tensor) -> float:
        found = run_local(range_finder(lambda: gradient, omega, sharding, power_passes=passes))
        return float((gradient @ found).square().sum())

    generator = torch.Generator().manual_seed(0)
    signs = sum(kept(random_signs((0, 160), 20, seed=0, name="w", refresh=i)) for i in range(20))
    gaussian = sum(kept(torch.randn(160, 20, generator=generator)) for _ in range(20))
    assert abs(signs / gaussian - 1) < 0.01
