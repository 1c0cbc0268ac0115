"""The table of engines: every one of them must give what one process gives.

A new engine is one row here, beside its file in ``arg_dist/engines``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from tests.launch.launching import Launcher
from tests.tolerances import LOSSES, LOW_PRECISION_LOSSES, ROUNDED_LOSSES, Tolerance


@dataclass(frozen=True)
class Engine:
    """One way to train.

    Attributes:
        name: what the test is called; for DeepSpeed's own launcher, one of ``cases.CASES``.
        launcher: who starts the processes.
        is_found: what must be there in the end, see ``engine_ways.describe``.
        way: function of ``engine_ways`` that trains.
        options: what that function is given.
        processes: how many to train with. The pool's tests have DDP and FSDP2 on other numbers, and
            DeepSpeed's own launcher ZeRO, which accelerate and the Trainer start no other way.
        losses: how far they may lie from those of one process in fp32.
    """

    name: str
    launcher: Launcher
    is_found: str
    way: str = "by_case"
    options: dict[str, Any] = field(default_factory=dict)
    processes: tuple[int, ...] = (2,)
    losses: Tolerance = LOSSES


FSDP = {"fsdp": True}
CPU = {"cpu": True}
MIXED = {"precision": "bf16"}
BF16: dict[str, Any] = {"losses": LOW_PRECISION_LOSSES}
BF16_LOSS: dict[str, Any] = {"losses": ROUNDED_LOSSES}

ENGINES = [
    Engine("one-process", "torchrun", "one process", "alone", processes=(1,)),
    Engine("ddp", "torchrun", "DDP", "torch_engine", {"engine": "DDP"}),
    Engine("fsdp2", "torchrun", "FSDP2 S0", "torch_engine", {"engine": "ROWS"}),
    Engine("fsdp2-columns", "torchrun", "FSDP2 S0 S1", "torch_engine", {"engine": "COLUMNS"}),
    Engine("hsdp", "torchrun", "FSDP2 R,S0", "torch_engine", {"engine": "HSDP"}),
    Engine("accelerate-ddp", "torchrun", "DDP", "accelerate_engine", CPU),
    Engine("accelerate-fsdp2", "torchrun", "FSDP2 S0", "accelerate_engine", FSDP),
    Engine("accelerate-zero0", "accelerate", "ZeRO-0", "accelerate_engine", {"stage": 0}),
    Engine("accelerate-zero1", "accelerate", "ZeRO-1", "accelerate_engine", {"stage": 1}),
    Engine("accelerate-zero2", "accelerate", "ZeRO-2", "accelerate_engine"),
    Engine("accelerate-zero3", "accelerate", "ZeRO-3", "accelerate_engine", {"stage": 3}),
    Engine("trainer-ddp", "torchrun", "DDP", "trainer_engine", CPU),
    Engine("trainer-fsdp2", "torchrun", "FSDP2 S0", "trainer_engine", FSDP),
    Engine("trainer-zero2", "accelerate", "ZeRO-2", "trainer_engine", {"stage": 2}),
    Engine("trainer-zero3", "accelerate", "ZeRO-3", "trainer_engine", {"stage": 3}),
    *(Engine(f"llama-zero{i}", "deepspeed", f"ZeRO-{i}", processes=(1, 2, 4)) for i in range(4)),
]  # fmt: skip

ENGINES += [
    Engine("ddp-bf16", "torchrun", "DDP", "torch_engine", {"engine": "DDP_BF16"}, **BF16),
    Engine("fsdp2-bf16", "torchrun", "FSDP2 S0", "torch_engine", {"engine": "ROWS_BF16"}, **BF16),
    Engine("accelerate-ddp-bf16", "torchrun", "DDP", "accelerate_engine", CPU | MIXED, **BF16),
    Engine("accelerate-fsdp2-bf16", "torchrun", "FSDP2 S0", "accelerate_engine", FSDP | MIXED,
           **BF16_LOSS),
    Engine("trainer-ddp-bf16", "torchrun", "DDP", "trainer_engine", CPU | MIXED, **BF16),
    Engine("zero0-bf16", "deepspeed", "ZeRO-0", **BF16),
    Engine("zero1-bf16", "deepspeed", "ZeRO-1", **BF16),
    Engine("zero2-bf16", "deepspeed", "ZeRO-2", **BF16),
    Engine("zero3-bf16", "deepspeed", "ZeRO-3", **BF16),
]  # fmt: skip

CHOSEN = os.environ.get("ARG_DIST_TEST_ENGINES", "").split()
"""Engines to which ``tests.versions`` limits a run, so that one which fails does not end others."""
if CHOSEN:
    ENGINES = [engine for engine in ENGINES if engine.name in CHOSEN]
