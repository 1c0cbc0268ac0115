"""The local part of a tensor."""

from __future__ import annotations

from torch import Tensor


def local_part(tensor: Tensor) -> Tensor:
    """The part of `tensor` on this process: the local tensor of a DTensor, else the tensor itself.

    A DTensor's own storage reports the size of the whole tensor.
    """
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part
