"""Every tensor made in the package states its dtype and device; neither is left to the job's."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "arg_dist"
FILES = sorted(PACKAGE.rglob("*.py"))

BOTH = ("dtype", "device")
FACTORIES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys("arange bartlett_window blackman_window empty empty_permuted".split(), BOTH),
    **dict.fromkeys("empty_strided eye full hamming_window hann_window".split(), BOTH),
    **dict.fromkeys("kaiser_window linspace logspace ones rand randint randn".split(), BOTH),
    **dict.fromkeys("randperm range scalar_tensor tensor zeros as_tensor asarray".split(), BOTH),
    **dict.fromkeys("sparse_coo_tensor sparse_csr_tensor tril_indices triu_indices".split(), BOTH),
    "frombuffer": ("dtype",),
    "Generator": ("device",),
}
"""Functions of torch that make a tensor, and what each call of them must name."""

OF_A_TENSOR = {"new_tensor": ("dtype",)}
"""Methods that do not take over the tensor's dtype; the other ``new_`` and ``_like`` do."""

AMBIENT = {
    "get_default_dtype",
    "set_default_dtype",
    "set_default_device",
    "set_default_tensor_type",
}
LEGACY = {
    f"{kind}Tensor"
    for kind in ("", "Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Byte", "Bool")
}

RAISES_ON_A_GPU = {
    *("cumsum", "cumprod", "histc", "bincount", "kthvalue", "median", "nanmedian", "put_"),
    *("scatter_reduce", "scatter_reduce_", "grid_sample", "interpolate", "resize_"),
}
"""Have no deterministic form on CUDA, so they raise under ``use_deterministic_algorithms``."""


def faults(tree: ast.AST, *, on_gpus: bool = True) -> Iterator[str]:
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, of_torch = node.func.attr, ast.unparse(node.func.value) == "torch"
        needed = FACTORIES.get(name, ()) if of_torch else OF_A_TENSOR.get(name, ())
        named = {keyword.arg for keyword in node.keywords}
        missing = [key for key in needed if key not in named]
        if missing:
            yield f"line {node.lineno}: {name} without {' and '.join(missing)}"
        if of_torch and name in AMBIENT | LEGACY:
            yield f"line {node.lineno}: {name} depends on, or sets, the job's defaults"
        if of_torch and name == "where" and all(map(is_number, node.args[1:])):
            yield f"line {node.lineno}: where of two numbers has the default dtype"
        if on_gpus and name in RAISES_ON_A_GPU:
            yield f"line {node.lineno}: {name} has no deterministic form on GPUs"


def is_number(node: ast.expr) -> bool:
    return isinstance(node.operand if isinstance(node, ast.UnaryOp) else node, ast.Constant)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_tensor_depends_on_the_jobs_defaults(path):
    on_gpus = path.parent.name != "planning"  # computes with NumPy
    assert not list(faults(ast.parse(path.read_text()), on_gpus=on_gpus))


@pytest.mark.parametrize(
    "code",
    [
        "torch.zeros(3)",
        "torch.zeros(3, dtype=torch.float32)",
        "torch.randn(2, device='cpu')",
        "torch.Generator()",
        "torch.where(x < 0, -1.0, 1.0)",
        "torch.FloatTensor([1])",
        "energies.cumsum(0)",
        "x.new_tensor([1])",
        "torch.set_default_dtype(torch.float32)",
    ],
)
def test_the_check_finds(code):
    assert list(faults(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    ["torch.zeros(3, dtype=d, device=x.device)", "x.new_zeros(2)", "torch.where(x < 0, x, 0.0)"],
)
def test_the_check_allows(code):
    assert not list(faults(ast.parse(code)))
