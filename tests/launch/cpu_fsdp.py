"""Runs a script with accelerate's FSDP on CPUs: ``cpu_fsdp.py SCRIPT ARGUMENT...``; for tests only.

accelerate shards with FSDP on devices like GPUs alone and turns it off elsewhere, though torch's
``fully_shard`` works over gloo. Here each process of a launch counts as one with a GPU that is
called "cpu". Everything else is as a user starts it.
"""

import os
import runpy
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType


def as_on_gpus(*_: object, **__: object) -> tuple[str, DistributedType]:
    """What accelerate decides on a machine with GPUs, but for the backend."""
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = as_on_gpus
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
