"""Identity of parameters and tensors while engines and users replace, move and reshape them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

CALLS_WITHOUT_GRADIENT = 3
"""Calls to ``step()`` in a row without any gradient after which the user is warned."""


class Place(NamedTuple):
    """Where a parameter is: the list that its group had when it was added, and the index in it.

    This holds no parameter by itself. If an engine shards a parameter and puts another tensor into
    the list, the whole parameter is freed; if it gives the group a list of its own tensors, this
    list still has the model's. A weak reference to a tensor would make
    ``torch.utils.swap_tensors`` refuse it, with which modules move such parameters.

    Attributes:
        params: the list.
        position: index in it.
    """

    params: list[Tensor]
    position: int

    @property
    def parameter(self) -> Tensor | None:
        """What is there now; None if the list has become shorter."""
        return self.params[self.position] if self.position < len(self.params) else None


Layout = tuple[Any, ...]
"""What a plan depends on in one tensor: ``id``, `requires_grad`, shape, strides, distribution."""


def layout_of(tensor: Tensor) -> Layout:
    """The layout of a tensor now.

    A tensor remains the same object when its contents are replaced (``tensor.data = ...``,
    ``swap_tensors``), so its ``id`` alone does not tell. Device and dtype are looked up at every
    step, and no plan depends on them.
    """
    return (
        id(tensor),
        tensor.requires_grad,
        None if is_lazy(tensor) else tuple(tensor.shape),
        tensor.stride() if tensor.layout == torch.strided and not is_lazy(tensor) else None,
        getattr(tensor, "placements", None),
        getattr(tensor, "device_mesh", None),
    )


def has_changed(before: Layout, now: Layout) -> bool:
    """Whether a tensor has another shape, strides or distribution; it may train or be frozen."""
    return before[2:] != now[2:]


class GradientsMissing:
    """Warns, once, when no parameter of the optimizer ever has a gradient."""

    def __init__(self) -> None:
        self._calls = 0

    def note(self, tensors: Iterable[Tensor], names: int) -> None:
        """Note one call to ``step()``.

        Args:
            tensors: the tensors of this call.
            names: number of the optimizer's parameters, for the message.
        """
        if self._calls >= CALLS_WITHOUT_GRADIENT:
            return
        self._calls = 0 if any(each.grad is not None for each in tensors) else self._calls + 1
        if self._calls == CALLS_WITHOUT_GRADIENT:
            warnings.warn(
                f"step: none of the optimizer's {names} parameters has had a gradient in "
                f"{self._calls} calls, so nothing is trained. Either backward() has not run, or "
                "the model has other parameters now (load_state_dict(assign=True), to_empty() and "
                "other conversions replace them): build the optimizer from the model's present "
                "parameters",
                stacklevel=6,
            )
