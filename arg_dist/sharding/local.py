"""The local part of a tensor, and parts of that: views wherever its strides allow it."""

from __future__ import annotations

import torch
from torch import Tensor


def local_part(tensor: Tensor) -> Tensor:
    """The part of `tensor` on this process: the local tensor of a DTensor, else the tensor itself.

    A DTensor's own storage reports the size of the whole tensor.
    """
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def as_reals(tensor: Tensor) -> Tensor:
    """The tensor itself if it is real; ``... x 2``, real and imaginary parts, if it is complex."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def elements(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Elements ``[start, stop)`` of `tensor` in row-major order, whatever its strides.

    Of a contiguous tensor a flat view. Of any other a view of some shape in the same order; a copy
    if the range is not made of whole rows (of one or more of the leading dimensions).
    """
    if tensor.is_contiguous():
        return tensor.reshape(-1)[start:stop]
    if (start, stop) == (0, tensor.numel()):
        return tensor
    each = tensor[0].numel()
    if start % each == 0 and stop % each == 0:
        return tensor[start // each : stop // each]
    first = start // each
    if stop <= (first + 1) * each:
        return elements(tensor[first], start - first * each, stop - first * each)
    return tensor.reshape(-1)[start:stop]
