"""What lies on this process of a tensor."""

from __future__ import annotations

from torch import Tensor


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of `tensor`: all of it, but of a DTensor its local tensor.

    The storage of a DTensor itself tells the size of its whole.
    """
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part
