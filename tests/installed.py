"""What the installed libraries can do, for tests of what only some versions do."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from arg_dist.sharding.entry import KNOWS_CONTEXT

GRADIENTS_OF_ANY_TYPE = hasattr(torch.Tensor, "grad_dtype")
"""Whether a gradient may have another type than its parameter: torch 2.10."""

IN_PYTHON = KNOWS_CONTEXT
"""Whether tests can stand in for devices and count reads: torch 2.7's modes see a read twice, and
its process groups cannot be written in Python."""

GLOO_ENDS = KNOWS_CONTEXT
"""Whether a process can always destroy its groups of gloo: in torch 2.7 it may wait for ever."""

QUIET_COMPILER = KNOWS_CONTEXT
"""Whether compiling leaves warning filters and random states as they are: not in torch 2.7."""

PRECISION_BY_BACKEND = hasattr(torch._C, "_set_fp32_precision_setter")
"""Whether the precision of products is chosen for each backend: torch 2.9."""


def deepspeed_quiet() -> list[str]:
    """The option by which DeepSpeed's launcher prints less; old ones have none."""
    package = find_spec("deepspeed")
    assert package is not None and package.origin is not None
    runner = Path(package.origin).parent / "launcher/runner.py"
    return ["--log_level=critical"] if "--log_level" in runner.read_text() else []
