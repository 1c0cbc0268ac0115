"""Which tensors can be trained: checked when the optimizer is built, and when it binds.

======================================= ==========================================================
parameter                               trained
======================================= ==========================================================
fp32, fp16, bf16                        moments and bases in fp32
fp64                                    full-rank Adam in fp64; low-rank state in fp32, and the
                                        update is added in fp64
complex64, complex128, complex32        as pairs of reals by full-rank Adam, as AdamW does
float8 and smaller                      refused: they cannot hold an update
integers, booleans, quantized           refused if they require a gradient; frozen ones are ignored
sparse, MKLDNN, nested                  refused
wrapper subclasses, except shards       refused: their own storage is empty
meta, uninitialized                     refused at the first step
======================================= ==========================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from arg_dist.config import ConfigError
from arg_dist.sharding.shard import local_part

TRAINED = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.complex32,
)
"""Types of the parameters that are trained."""


def check_kind(name: str, parameter: Tensor) -> None:
    """Refuse a parameter of a kind that cannot be trained; one that is frozen may be of any kind.

    Args:
        name: its name.
        parameter: the parameter, which an engine may have sharded, or may shard later.

    Raises:
        ConfigError: its type, layout or class is not supported.
    """
    if not parameter.requires_grad or is_lazy(parameter):
        return
    part = local_part(parameter)
    kind = type(part).__name__
    if part.is_nested or part.layout != torch.strided:
        layout = "nested" if part.is_nested else str(part.layout).removeprefix("torch.")
        _refuse(name, f"is a tensor of the layout {layout}", "use a dense tensor (to_dense())")
    if _is_wrapper(part):
        _refuse(
            name,
            f"is a {kind}, a subclass of Tensor that wraps others or redefines operations",
            "train the plain tensor, and quantize or convert it afterwards or in forward()",
        )
    if part.dtype in TRAINED and not part.is_quantized:
        return
    dtype = str(part.dtype).removeprefix("torch.")
    if part.dtype.is_floating_point:
        _refuse(
            name,
            f"is of type {dtype}, which is too coarse to hold an update",
            "train it in bfloat16 or float32, and convert it in forward() or after training",
        )
    _refuse(
        name,
        f"is of type {dtype}, which has no gradient",
        "call requires_grad_(False) on it, or convert it to a floating-point type",
    )


def check_shape(name: str, parameter: Tensor) -> None:
    """Refuse a parameter that has no shape yet.

    Raises:
        ConfigError: it belongs to a lazy module that has not run.
    """
    if parameter.requires_grad and is_lazy(parameter):
        _refuse(
            name,
            "is not initialized (a lazy module)",
            "run the model once before the optimizer's first step",
        )


def check_present(name: str, target: Tensor) -> None:
    """Refuse a tensor without values.

    Raises:
        ConfigError: it is on the meta device.
    """
    if target.requires_grad and local_part(target).is_meta:
        _refuse(
            name,
            "is on the meta device, where tensors have no values",
            "build the optimizer after the model has its weights (to_empty() and its "
            "initialization, or loading): these may replace the parameters",
        )


def check_values(name: str, target: Tensor) -> None:
    """Refuse a tensor that cannot be updated in place as it is now.

    Args:
        name: the parameter's name.
        target: the tensor that the optimizer updates for it.

    Raises:
        ConfigError: several of its elements share memory, or as in
            :func:`check_kind`.
    """
    check_kind(name, target)
    part = local_part(target)
    overlaps = part.numel() > 0 and any(
        stride == 0 and size > 1 for stride, size in zip(part.stride(), part.shape, strict=True)
    )
    if overlaps:
        _refuse(
            name,
            f"has several elements in one place (shape {tuple(part.shape)}, strides "
            f"{part.stride()}: it was expanded)",
            "set parameter.data = parameter.data.contiguous()",
        )
    if part.is_conj():
        _refuse(name, "is a conjugate view", "set parameter.data = parameter.data.resolve_conj()")


def _is_wrapper(part: Tensor) -> bool:
    """Whether operations on `part` are not those on its own memory."""
    kind: Any = type(part)
    if kind.__name__ == "FakeTensor":  # stands for a plain tensor where only shapes are computed
        return False
    return bool(kind.__torch_dispatch__ is not Tensor.__torch_dispatch__)


def _refuse(name: str, found: str, remedy: str) -> None:
    raise ConfigError(f"{name}: {found}; AdaRankGrad cannot train it: {remedy}")
