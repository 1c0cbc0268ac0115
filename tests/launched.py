"""What a step would launch on a GPU, and the bytes that it moves there, counted without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from matrices import gaussian
from one_process import parameters_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from arg_dist import AdaRankGrad, algorithm, step
from arg_dist.subspace import norms

STEADY = {"max_rank": 4, "min_rank": 4, "min_gap": 99, "max_gap": 99}
"""Settings of a matrix that refreshes once, at the start."""
STARTS_NOTHING = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "_local_scalar_dense",
)


class Launched(TorchDispatchMode):
    """Counts operators that start something on a device, and what they read and write.

    Each operand counts once, and what is changed in place twice; a list is one operator.

    Attributes:
        operators: how often each was called.
        moved: bytes read and written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        has_tensors = any(is_tensor(each) for each in tree_leaves((args, kwargs, result)))
        if func.is_view or name in STARTS_NOTHING or not has_tensors:
            return result
        self.operators[name] += 1
        arguments = func._schema.arguments
        given = {argument.name: each for argument, each in zip(arguments, args, strict=False)}
        given.update(kwargs)
        for argument in arguments:
            tensors = [each for each in tree_leaves(given.get(argument.name)) if is_tensor(each)]
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            only_written = argument.name == "out" or name in ("copy_", "fill_", "zero_")
            times = 1 if not is_written or only_written else 2
            self.moved += times * sum(map(size_of, tensors))
        if not func._schema.is_mutable:
            self.moved += sum(map(size_of, filter(is_tensor, tree_leaves(result))))
        return result


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def size_of(tensor: Tensor) -> int:
    """Bytes of its elements; what is expanded is there once."""
    held = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return torch.Size(held).numel() * tensor.element_size()


def gradients_of_step(step: int, weights: Sequence[Tensor]) -> list[Tensor]:
    """Another gradient for each of the weights in each step, of their types."""
    return [
        gaussian(*weight.shape, seed=100 * step + i).to(weight.dtype)
        for i, weight in enumerate(weights)
    ]


def take(optimizer: AdaRankGrad, gradients: Sequence[Tensor]) -> None:
    """One step, without copies of the gradients."""
    for parameter, gradient in zip(parameters_of(optimizer), gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """No value can be read without waiting, and matrices have their work done together."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (norms, algorithm, step):
            patched.setattr(module, "in_host_memory", lambda part: False)
        yield
