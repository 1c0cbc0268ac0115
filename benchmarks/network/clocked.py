"""Run a training script and record each of its steps: ``clocked.py NOTES HOOK SCRIPT ARG...``

Each process writes NOTES/process-K.json, a list with an entry at the end of each call to the
engine's ``train_step``: seconds on a clock shared by all processes of the machine, seconds this
process has waited for collectives so far, and bytes its host's link has carried so far. Otherwise
the script runs unchanged.

Waiting is the time inside ``Work.wait``, which every ZeRO collective on CPUs calls. It includes the
backend's copies and reductions, and the time until stragglers arrive.

HOOK compresses what DistributedDataParallel sends: ``fp16`` (that of bf16 needs NCCL) or
``powersgd``. Or FSDP2 takes its place and shards a copy of the model over the processes of each
host: with ``hsdp`` it averages the gradients of all copies, with ``hsdp-apart`` of none. Or it is
empty.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout

from benchmarks.network.methods import HSDP_HOOKS
from launchers.pretraining.accelerate_engine import AccelerateSetup
from launchers.pretraining.training import Engine
from launchers.reporting.files import write_json
from tests.hosts.namespaces import INTERFACE, read_traffic


class Notes:
    """Records of this process: `steps` has the entries, `waited` is the cumulative wait."""

    def __init__(self) -> None:
        self.waited = 0.0
        self.steps: list[dict[str, float]] = []

    def end_step(self) -> None:
        """Record the end of a step."""
        traffic = read_traffic(Path("/proc/net/dev").read_text(), INTERFACE)
        entry = {"clock": time.monotonic(), "waited": self.waited}
        self.steps.append(entry | {"received": traffic.received, "sent": traffic.sent})

    def listen(self) -> None:
        """Patch torch and the engine to record every wait and every step from now on."""
        wait, train_step = dist.Work.wait, Engine.train_step

        def clocked_wait(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return wait(*arguments, **named)
            finally:
                self.waited += time.perf_counter() - began

        def clocked_step(*arguments: Any, **named: Any) -> Any:
            result = train_step(*arguments, **named)
            self.end_step()
            return result

        dist.Work.wait = clocked_wait  # type: ignore[method-assign]
        Engine.train_step = clocked_step  # type: ignore[method-assign]


def compress(hook: str) -> None:
    """Register a communication hook with every DistributedDataParallel from now on."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    build = DistributedDataParallel.__init__

    def build_with_hook(model: Any, *arguments: Any, **named: Any) -> None:
        build(model, *arguments, **named)
        if hook == "fp16":
            model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        else:  # from the third step on, of rank 4, as compressing as ours of its smallest rank
            state = powerSGD_hook.PowerSGDState(None, 4, start_powerSGD_iter=2)
            model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

    DistributedDataParallel.__init__ = build_with_hook  # type: ignore[method-assign, assignment]


def shard_hosts(*, averages: bool) -> None:
    """Shard every model over the processes of its host from now on, in place of DDP.

    accelerate shards on GPUs only, so it is given a model that is sharded, and leaves it alone.
    """
    build = AccelerateSetup.build

    def build_sharded(setup: Any, model: Any, *arguments: Any) -> Any:
        each = int(os.environ["LOCAL_WORLD_SIZE"])
        shape = dist.get_world_size() // each, each
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        for layer in (*model.model.layers, model):
            fully_shard(layer, mesh=mesh if averages else mesh["shard"])
        return build(setup, model, *arguments)

    Accelerator.prepare_model = _as_it_is
    AccelerateSetup.build = build_sharded  # type: ignore[method-assign, assignment]


def _as_it_is(accelerator: Accelerator, model: nn.Module, *_: Any, **__: Any) -> nn.Module:
    return model


def main() -> None:
    """Run the command line."""
    folder, hook, script = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    notes = Notes()
    notes.listen()
    if hook in HSDP_HOOKS:
        shard_hosts(averages=hook == "hsdp")
    elif hook:
        compress(hook)
    sys.argv = sys.argv[3:]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        write_json(folder / f"process-{os.environ['RANK']}.json", notes.steps)


if __name__ == "__main__":
    main()
