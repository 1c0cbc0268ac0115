"""What the installed libraries can do, for tests of what only some versions do."""

from __future__ import annotations

import torch

GRADIENTS_OF_ANY_TYPE = hasattr(torch.Tensor, "grad_dtype")
"""Whether a gradient may have another type than its parameter: torch 2.10."""

PRECISION_BY_BACKEND = hasattr(torch._C, "_set_fp32_precision_setter")
"""Whether the precision of products is chosen for each backend: torch 2.9."""
