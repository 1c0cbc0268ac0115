"""Temporary memory of one process in a step, from running it on tensors without data.

A real shard steps: its gradient is read, the algorithm runs as recorded, and the weights are
updated. Every storage that torch makes on the way is counted until it is freed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import accumulate, count, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arg_dist.config import AdaRankGradConfig
from arg_dist.library_internals import (
    ADDRESS_OF_STORAGE,
    DISPATCH_MODE,
    SCHEMA_OF_OPERATOR,
    UNSAFE_VIEW,
)
from arg_dist.sharding.drivers import Round
from arg_dist.sharding.shard import Shard
from arg_dist.step import GradientPart, Updates, gradient_parts
from arg_dist.subspace.state import State


class Point(NamedTuple):
    """Bytes of one process when it makes a request, or has its update.

    Attributes:
        held: bytes held then.
        passing: most bytes on the way there, beyond those held there and those held before.
    """

    held: int
    passing: int


class Unfilled(DISPATCH_MODE.imported()):  # type: ignore[misc]
    """Operators on the meta device, sparing torch most of what it derives of shapes in Python."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the check costs more than the operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func.is_view or func is VIEW_OF_PRODUCT:
            return func(*args, **options)
        return self.made(_made(func, args, options))

    def made(self, result: Any) -> Any:
        """What an operator returned that makes or writes tensors."""
        return result


def _made(func: Any, args: Any, options: Any) -> Any:
    if func in NEW:
        return _empty(args[1], options.get("dtype") or args[0].dtype)
    if func is torch.ops.aten.addmm.default:
        return _empty((args[1].shape[0], args[2].shape[1]), args[0].dtype)
    if func is torch.ops.aten.mm.default:
        return _empty((args[0].shape[0], args[1].shape[1]), args[0].dtype)
    schema = SCHEMA_OF_OPERATOR.of(func)
    if schema.is_mutable:  # nothing is to be written
        written = options["out"] if "out" in options else args[0]
        return written if schema.returns else None
    if func is torch.ops.aten.linalg_vector_norm.default:
        return _norms(*args, **options)
    form = (func, *map(_form, args), *map(_form, options.values()))
    if form not in _known:
        result = func(*args, **options)
        if not isinstance(result, Tensor):
            return result
        _known[form] = (result.size(), result.stride(), result.dtype)
    size, stride, dtype = _known[form]
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


VIEW_OF_PRODUCT = UNSAFE_VIEW.of(torch.ops.aten).default
NEW = {torch.ops.aten.new_empty.default, torch.ops.aten.new_zeros.default}
_known: dict[tuple[Any, ...], tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}
"""Form of the one tensor that an operator makes, by the operator and the form of its arguments."""


def _empty(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _norms(
    matrix: Tensor,
    order: float = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    dims: Sequence[int] = range(matrix.ndim) if dim is None else [d % matrix.ndim for d in dim]
    kept = [
        1 if d in dims else size for d, size in enumerate(matrix.shape) if keepdim or d not in dims
    ]
    return _empty(kept, dtype or matrix.dtype)


def _form(argument: Any) -> Any:
    """What of an argument decides the form of the result."""
    if isinstance(argument, Tensor):
        return argument.size(), argument.stride(), argument.dtype
    return tuple(map(_form, argument)) if isinstance(argument, (list, tuple)) else argument


class Allocations(Unfilled):
    """Notes every storage that is allocated or freed within it.

    Args:
        known: tensors whose storages are there already.

    Attributes:
        log: number of a storage, and its bytes; negative bytes where it is freed.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.log: list[tuple[int, int]] = []
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._numbers = count()
        for tensor in known:
            self.number_of(tensor)
        self.log.clear()

    def made(self, result: Any) -> Any:
        """Notes the storages of the tensors."""
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, Tensor):
                self.number_of(each)
        return result

    def number_of(self, tensor: Tensor) -> int:
        """The number of a tensor's storage, which is noted if it is new."""
        storage = tensor.untyped_storage()
        where, size = ADDRESS_OF_STORAGE.of(storage), storage.nbytes()
        if where in self._alive:
            return self._alive[where][0]
        number = next(self._numbers)
        self.log.append((number, size))

        def free(_: object) -> None:
            del self._alive[where]
            self.log.append((number, -size))

        self._alive[where] = number, weakref.ref(storage, free)
        return number


def points_of(
    shard: Shard,
    steps: Callable[[GradientPart], Generator[Round, None, Any]],
    state: State,
    settings: AdaRankGradConfig,
) -> list[Point]:
    """What a shard's step holds beside its state at each request, and with its update.

    The norms of its gradient, which are known before the step, are not counted.

    Args:
        shard: the shard, on the meta device.
        steps: its recorded step on a gradient.
        state: its state, updated; empty before the first step.
        settings: the settings of its parameter group.
    """
    with Unfilled():
        gradient = gradient_parts([shard])[shard.unit]
    target = shard.fragment.target
    assert target.grad is not None
    allocations = Allocations([target, target.grad, *_tensors(state)])
    log, marks, answers = allocations.log, [0], [0]
    with allocations:
        requests = steps(gradient)
        try:
            while True:
                transfers = next(requests)
                marks.append(len(log))
                answers.append(sum(t.answer_bytes(shard.me) for t in transfers))
        except StopIteration as finished:
            update = finished.value
        marks.append(len(log))
        Updates().add(shard, update, settings)
    kept = {allocations.number_of(tensor) for tensor in _tensors(state)}
    held = [0, *accumulate(0 if number in kept else size for number, size in log)]
    points = []
    for (start, stop), answer in zip(pairwise(marks), answers, strict=True):
        before, after = held[start] + answer, held[stop]
        points.append(Point(after, max(0, max(held[start : stop + 1]) - max(before, after))))
    end, passing = points.pop()
    updating = max(held[marks[-1] :]) - end
    return [*points, Point(end, max(passing, updating))]


def _tensors(state: State) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]
