"""The grouped kernels: what they compute, what they compile to, and a torch without Triton."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from matrices import whole_numbers
from torch import Tensor

from arg_dist import subspace
from arg_dist.subspace import products
from tests.patience import patient

HERE = Path(__file__).parent
FP32, BF16 = torch.float32, torch.bfloat16


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_kernels_equal_the_plain_path(device: str) -> None:
    if not products.is_installed():
        pytest.skip("no Triton for the kernels")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    environment = {**os.environ, "KERNELS_ON": device, "TRITON_INTERPRET": str(+(device == "cpu"))}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_kernels.py"],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=patient(110),
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout + run.stderr


def test_squares_are_those_of_the_matrix_itself_in_the_plain_path() -> None:
    gradients = [whole_numbers(5, 7), whole_numbers(5, 7, seed=1)]
    bases = [whole_numbers(7, 3, seed=2), whole_numbers(7, 3, seed=3)]
    found, squares = products.plain_project(gradients, bases)
    for G, Q, P, square in zip(gradients, bases, found, squares, strict=True):
        assert torch.equal(P, G @ Q) and torch.equal(square, G.square().sum(1))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_plain_updates_are_those_of_the_formula(dtype: torch.dtype) -> None:
    W, E = whole_numbers(5, 7).to(dtype), whole_numbers(5, 7, seed=1)
    N, Q, phi = whole_numbers(5, 2, seed=2), whole_numbers(7, 2, seed=3), whole_numbers(5, seed=4)
    expected = (0.5 * W.float() - 0.25 * (N @ Q.T + phi[:, None] * E)).to(dtype)
    products.plain_apply([W], [N], [Q], [phi], [E], keep=0.5, step=-0.25)
    assert torch.equal(W, expected)


# -- the choice -----------------------------------------------------------------------------------


def test_on_a_cpu_the_plain_path_is_taken() -> None:
    assert not products.available(torch.device("cpu"))
    G, Q = [whole_numbers(5, 7)], [whole_numbers(7, 3, seed=2)]
    assert torch.equal(products.project(G, Q)[0], products.plain_project(G, Q)[0])
    W, expected = whole_numbers(5, 7), whole_numbers(5, 7)
    N = [whole_numbers(5, 3)]
    products.apply([W], N, Q, keep=0.5, step=1.0)
    products.plain_apply([expected], N, Q, keep=0.5, step=1.0)
    assert torch.equal(W, expected)


def test_without_triton_the_package_works_and_with_it_importing_does_not_load_it() -> None:
    script = """
import sys
import torch
import arg_dist
from arg_dist.subspace import products
assert "triton" not in sys.modules
sys.modules["triton"] = None  # as if it were not installed
assert not products.available(torch.device("cuda", 0))
ones = torch.ones(3, 3)
found, squares = products.project([ones], [ones])
assert (found == 3).all() and (squares == 3).all()
products.apply([ones], [ones], [ones], keep=1.0, step=1.0)
weight = torch.nn.Parameter(torch.ones(8, 8))
optimizer = arg_dist.AdaRankGrad([("weight", weight)], lr=1e-3)
(weight @ torch.arange(8.0)).square().sum().backward()
optimizer.step()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=patient(50))


def test_a_triton_that_cannot_run_is_named_and_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    products._works.cache_clear()
    monkeypatch.setattr(products, "is_installed", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "ones", lambda *shape, **options: whole_numbers(*shape))
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "arg_dist.subspace.grouped_kernels", raising=False)
    monkeypatch.delattr(subspace, "grouped_kernels", raising=False)
    with pytest.warns(UserWarning, match="cannot run on cuda:0"):
        assert not products.available(torch.device("cuda", 0))
    assert not products.available(torch.device("cuda", 0))
    products._works.cache_clear()


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        (([(3, 4)], [(5, 2)]), "bases"),
        (([(3, 4), (4, 3)], [(4, 2), (3, 2)]), "gradients"),
        (([(3, 4)], []), "bases"),
        (([], [(4, 2)]), "bases"),
    ],
)
def test_lists_that_do_not_belong_together_are_refused(operands, message: str) -> None:
    gradients, bases = ([torch.zeros(shape) for shape in each] for each in operands)
    with pytest.raises(ValueError, match=message):
        products.project(gradients, bases)


def test_rows_need_what_they_scale() -> None:
    W, N, Q = torch.zeros(3, 4), torch.zeros(3, 2), torch.zeros(4, 2)
    with pytest.raises(ValueError, match="rows without outside"):
        products.apply([W], [N], [Q], [torch.zeros(3)], keep=1.0, step=1.0)
    with pytest.raises(ValueError, match="rows: got the shapes"):
        products.apply([W], [N], [Q], [torch.zeros(4)], [W], keep=1.0, step=1.0)


def test_a_basis_has_one_or_two_parts() -> None:
    with pytest.raises(ValueError, match="pass 1 or 2"):
        products.project([torch.zeros(3, 4).bfloat16()], [torch.zeros(4, 2)], parts=3)


# -- code for sm_90 -------------------------------------------------------------------------------


class Compiled(NamedTuple):
    """What a kernel is on an H100 or H200."""

    registers: int
    spilled: int
    shared: int
    ptx: str


def compiled(launch: Any, folder: Path) -> Compiled:
    """Compile what a launch on a GPU would, without one."""
    import triton
    from triton.backends.compiler import GPUTarget

    hopper = SimpleNamespace(
        get_current_device=lambda: -1,  # no GPU's, which has kernels for itself
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(triton.runtime.jit, "driver", SimpleNamespace(active=hopper))
        binary = launch.kernel.warmup(
            torch.tensor(launch.table, dtype=torch.int64, device="cpu"),
            grid=(launch.programs,),
            **launch.numbers,
            **launch.constants,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run(
        [tool, "-res-usage", cubin], capture_output=True, text=True, check=True, timeout=patient(30)
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Compiled(int(found[1]), int(found[2]), binary.metadata.shared, binary.asm["ptx"])


def empty(
    rows: int, columns: int, dtype: torch.dtype = FP32, is_transposed: bool = False
) -> Tensor:
    shape = (columns, rows) if is_transposed else (rows, columns)
    matrix = torch.empty(shape, dtype=dtype, device="cpu")
    return matrix.T if is_transposed else matrix


MANY = 80
"""Matrices of a list, so that no multiprocessor is idle with large blocks."""
SHARED = 227 * 1024
"""Bytes of shared memory that a program may have on sm_90."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if not products.is_installed():
        pytest.skip("no Triton for the kernels")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_squares_on_sm_90(dtype: torch.dtype, is_transposed: bool, cache: Path) -> None:
    from arg_dist.subspace import grouped_kernels as grouped

    gradients = [empty(1024, 2048, dtype, is_transposed)] * MANY
    (launch,) = grouped.squarings(gradients, [torch.empty(1024).double()] * MANY)
    found = compiled(launch, cache)
    check(found, None)
    # 16 bytes of the gradient at a time, whatever its order
    assert "ld.global.v4.b32" in found.ptx or "cp.async.cg.shared.global" in found.ptx


@pytest.mark.parametrize(
    ("count", "rank", "dtype", "is_transposed", "product", "instruction"),
    [
        (MANY, 256, BF16, False, "tf32x3", "m64n128k16.f32.bf16.bf16"),
        (MANY, 37, BF16, True, "tf32x3", "m64n64k16.f32.bf16.bf16"),
        (1, 16, BF16, False, "tf32x3", "m64n16k16.f32.bf16.bf16"),
        (MANY, 256, FP32, False, "tf32x3", "m64n128k8.f32.tf32.tf32"),
        (1, 128, FP32, True, "tf32", "m64n128k8.f32.tf32.tf32"),
        (MANY, 64, FP32, False, "ieee", None),
    ],
)
def test_project_on_sm_90(count, rank, dtype, is_transposed, product, instruction, cache) -> None:
    from arg_dist.subspace import grouped_kernels as grouped

    rows, columns = 1024, 2048
    (launch,) = grouped.projections(
        [empty(rows, columns, dtype, is_transposed)] * count,
        [empty(columns, rank)] * count,
        [empty(rows, rank)] * count,
        [torch.empty(rows)] * count,
        product=product,
        parts=2,
    )
    found = compiled(launch, cache)
    check(found, instruction)
    # the gradient goes to shared memory by 16 bytes at a time
    assert re.search(r"cp\.async\.cg\.shared\.global [^;]*, (0x10|16), ", found.ptx)


@pytest.mark.parametrize(
    ("count", "size", "rank", "dtype", "is_transposed", "outside", "product", "instruction"),
    [
        (MANY, 1024, 256, BF16, False, BF16, "tf32x3", "m64n128k8.f32.tf32.tf32"),
        (MANY, 1024, 37, FP32, True, FP32, "tf32x3", "m64n128k8.f32.tf32.tf32"),
        (1, 1024, 64, FP32, False, None, "tf32", "m64n64k8.f32.tf32.tf32"),
        (MANY, 1023, 37, BF16, False, FP32, "tf32x3", "m64n64k8.f32.tf32.tf32"),
        (1, 1024, 37, FP32, False, FP32, "ieee", None),
    ],
)
def test_apply_on_sm_90(
    count, size, rank, dtype, is_transposed, outside, product, instruction, cache
) -> None:
    from arg_dist.subspace import grouped_kernels as grouped

    added = None if outside is None else [empty(size, size, outside, is_transposed)] * count
    (launch,) = grouped.applications(
        [empty(size, size, dtype, is_transposed)] * count,
        [empty(size, rank)] * count,
        [empty(size, rank)] * count,
        None if added is None else [torch.empty(size)] * count,
        added,
        keep=1.0,
        step=1.0,
        product=product,
    )
    found = compiled(launch, cache)
    check(found, instruction)
    # weights are written by 16 bytes at a time, where 16 divides their size
    assert ("st.global.v4.b32" in found.ptx) == (size % 16 == 0)


def check(found: Compiled, instruction: str | None) -> None:
    assert found.spilled == 0
    assert found.registers <= 255
    assert found.shared <= SHARED
    if instruction is None:
        assert "wgmma" not in found.ptx and "mma.sync" not in found.ptx
    else:
        assert f"wgmma.mma_async.sync.aligned.{instruction}" in found.ptx
