"""What is planned and run: models under engines. Imports nothing that a test must not import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BUCKET = 10**6
"""Elements of the engine's buckets."""

FULL = {"max_rank": 0.25, "min_rank": 0.25}
"""Ranks at their largest."""


@dataclass(frozen=True)
class Case:
    """A model under an engine.

    Attributes:
        model: a size.
        vocabulary: its tokens.
        engine: as the plan calls it.
        dtype: of the weights that it computes with.
        settings: the optimizer's.
        copies: of the model, each sharded over its share of the processes.
        mesh: the processes by axes, where tensor parallelism cuts the model too.
    """

    model: str
    vocabulary: int
    engine: str
    dtype: str = "fp32"
    settings: dict[str, Any] = field(default_factory=lambda: FULL)
    copies: int = 1
    mesh: str | None = None

    @property
    def has_temporaries(self) -> bool:
        """Whether they are measured: of each way to lay `nano` out."""
        # DeepSpeed trains copies in fp32 of weights in bf16
        own = self.dtype == "fp32" or self.engine in ("none", "fsdp2")
        ways = self.engine in ("none", "ddp", "zero2", "zero3", "fsdp2")
        alike = self.copies == 1 and self.settings in (FULL, BUCKETS, FEW_BITS)
        return self.model == "nano" and own and ways and alike

    @property
    def name(self) -> str:
        """What the test is called."""
        return "-".join([self.model, self.engine, self.dtype, *map(str, self.settings.values())])


NANO, SMALL = ("nano", 258), ("60m", 32000)
BUDGET = {"state_budget": 5_000_000, "energy": 1.0}
WHOLE_BASES = {"max_rank": 48, "min_rank": 48, "shard_basis": False, "residual": "none"}
BUCKETS = {**FULL, "bucket_size": 2_000_000}
FEW_BITS = {**FULL, "state_dtype": "int8", "full_rank_state": "int8"}
QUICK = {**FULL, "polar_steps": 1}
SKETCH = {"gradient_sync": "sketch", "max_rank": 0.25, "min_rank": 0.25}
SKETCHED = (
    {"residual": "none", "sync_precision": "bf16"},
    {
        "residual": "matched",
        "residual_sync_bits": 1,
        "residual_back_bits": 1,
        "max_grad_norm": 1.0,
    },
    {"residual_momentum": 0.5, "max_rank": 8, "min_rank": 8, "gradient_budget": "1GiB"},
)
PROJECTED = {**SKETCH, "residual": "none", "gradient_budget": "1GiB"}
CASES = [
    *(Case(*NANO, engine) for engine in ("none", "ddp", "zero0", "zero1", "zero2", "zero3")),
    Case(*NANO, "fsdp2"),
    *(Case(*NANO, engine, "bf16") for engine in ("none", "fsdp2", "zero0", "zero2", "zero3")),
    *(Case(*NANO, engine, settings=BUDGET) for engine in ("zero2", "zero3", "fsdp2")),
    Case(*NANO, "fsdp2", settings=WHOLE_BASES),
    *(Case(*NANO, engine, settings=BUCKETS) for engine in ("ddp", "zero3")),
    *(Case(*NANO, engine, settings=FEW_BITS) for engine in ("none", "zero2", "fsdp2")),
    *(Case(*NANO, "ddp", settings={**SKETCH, **more}) for more in SKETCHED),
    Case(*NANO, "none", settings=PROJECTED),
    *(Case(*SMALL, engine, settings=QUICK) for engine in ("zero2", "fsdp2")),
]
IN_COPIES = [
    Case(*NANO, "fsdp2", settings={**chosen, "max_rank": 0.25, "min_rank": 0.25}, copies=2)
    for chosen in (
        {},  # the engine averages
        {"gradient_sync": "sketch"},
        {"gradient_sync": "sketch", "residual": "none", "sync_precision": "bf16"},
        {
            "gradient_sync": "sketch",
            "residual_sync_bits": 1,
            "max_grad_norm": 1.0,
            "shard_basis": True,
        },
    )
]
"""On four processes."""
ON_MESHES = [
    Case("nano", vocabulary, "fsdp2", settings={**FULL, **chosen}, mesh=mesh)
    for vocabulary, mesh, chosen in (
        (258, "fsdp=2,tp=2", {}),
        (261, "fsdp=2,tp=2", {"residual": "none", "shard_basis": False}),
        (258, "replicate=2,fsdp=1,tp=2", {"residual": "matched"}),
    )
]
"""On four processes."""
